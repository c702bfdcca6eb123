// A CUDA runtime without a GPU: kernels are known by name, and launches are handed to the test that
// loaded the module (runtime.py). Linked in place of libcudart.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

// Null, or why the launch failed
using Run = const char* (*)(const char* name, int grid, int threads, size_t shared_bytes,
                            void** arguments);

bool loads = true;  // or as in a capture, which cannot load kernels
Run run_kernel;
int major, multiprocessors, memsets;
const char* reason = "";
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> all;
    return all;
}

std::set<const void*>& loaded() {
    static std::set<const void*> all;
    return all;
}

cudaError_t refuse_loading() {
    reason = "the kernel was not loaded when the backend was chosen";
    return cudaErrorStreamCaptureUnsupported;
}

// What a tensor map says, as plain numbers: base, columns, rows, bytes of a row, box, bytes of one.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                const cuuint64_t* sizes, const cuuint64_t* pitch, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const auto address = reinterpret_cast<uint64_t>(base);
    const bool half = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const bool legal = rank == 2 && half && address % 16 == 0 && pitch[0] % 16 == 0 &&
                       pitch[0] < uint64_t(1) << 40 && box[0] * 2 <= 128 && box[0] <= 256 &&
                       box[1] <= 256 && box[0] && box[1] && steps[0] == 1 && steps[1] == 1 &&
                       sizes[0] && sizes[1] && sizes[0] <= uint64_t(1) << 32 &&
                       sizes[1] <= uint64_t(1) << 32 &&
                       interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                       swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                       fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    if (!legal || reinterpret_cast<uint64_t>(map) % 64) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t plain[7] = {address, sizes[0], sizes[1], pitch[0], box[0], box[1], 2};
    std::memcpy(map, plain, sizeof(plain));
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void fake_device(Run run, int capability, int count) {
    run_kernel = run, major = capability, multiprocessors = count;
}
__attribute__((visibility("default"))) void fake_loading(bool may) { loads = may; }
__attribute__((visibility("default"))) int fake_memsets() { return memsets; }

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
    names()[host] = name;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorUnknown;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
    const auto found = names().find(function);
    reason = "no kernel of this module";
    if (found == names().end() || run_kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (!loaded().count(function)) return refuse_loading();
    reason = run_kernel(found->second.c_str(), int(grid.x), int(block.x), shared_bytes, arguments);
    return reason ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
    ++memsets;
    std::memset(start, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    return value <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
    if (!loads && !loaded().count(function)) return refuse_loading();
    loaded().insert(function);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrComputeCapabilityMajor ? major : multiprocessors;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return reason; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    *function = reinterpret_cast<void*>(&encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"
