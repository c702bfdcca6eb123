#include "finish.cuh"

#include <algorithm>

#include "launch.h"
#include "runtime.h"

namespace psm::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishArgs args) {
    __shared__ FinishShared shared;
    finish_rows<T>(args, shared);
}

}  // namespace

void finish(const FinishArgs& request, Dtype dtype, int device, void* stream) {
    if (request.batch == 0) return;
    const DeviceGuard guard(device);
    const void* kernel = visit_dtype(dtype, [](auto type) {
        return reinterpret_cast<const void*>(finish_kernel<typename decltype(type)::type>);
    });
    FinishArgs args = request;
    void* arguments[] = {&args};
    launch(kernel, "finish", std::min(args.batch, 1 << 16), kFinishThreads, 0, stream, arguments);
}

}  // namespace psm::cuda
