// Calls of the CUDA runtime, each checked.
#pragma once

#include <cuda_runtime.h>

#include <new>
#include <stdexcept>
#include <string>

#include "../common/pass.cuh"

namespace psm::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a launch error that is not sticky must not fail the next call
    throw std::runtime_error(std::string("psm_kernels: ") + what + ": " +
                             cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

#ifdef PSM_CUDA_TRAP
// One place for the process: what comes after a kernel that trapped fails anyway.
inline Trapped* trapped() {
    static Trapped* const place = [] {
        void* memory = nullptr;
        check(cudaHostAlloc(&memory, sizeof(Trapped), cudaHostAllocPortable | cudaHostAllocMapped),
              "cudaHostAlloc");
        return new (memory) Trapped{};
    }();
    return place;
}
// Waits for the kernel that was started, outside of a graph, to tell of a trap at once.
inline void check_trap(cudaStream_t stream, const char* name) {
    cudaStreamCaptureStatus capture;
    check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone) return;
    const cudaError_t error = cudaStreamSynchronize(stream);
    const Trapped at = *trapped();
    constexpr const char* kNames[] = {"", "full", "empty", "rows full", "rows empty",
                                      "copied"};
    const bool staged = at.what == Waits::kFull || at.what == Waits::kEmpty;
    const std::string where = at.what == Waits::kNone ? "" :
        ": block " + std::to_string(at.block) + ", warp " + std::to_string(at.warp) +
        " waits for barrier `" + kNames[int(at.what)] + "`" +
        (staged ? " of stage " + std::to_string(at.stage) : "");
    check(error, (name + where).c_str());
}
#else
inline Trapped* trapped() { return nullptr; }
inline void check_trap(cudaStream_t, const char*) {}
#endif

class DeviceGuard {
   public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;

   private:
    int device_, before_ = 0;
};

// The driver loads a kernel when it is first asked for, which a graph capture does not allow.
inline void load(const void* function, const char* name) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, function), name);
}

inline int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

}  // namespace psm::cuda
