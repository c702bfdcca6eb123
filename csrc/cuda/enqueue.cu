#include "enqueue.cuh"

#include <algorithm>

#include "launch.h"
#include "runtime.h"

namespace psm::cuda {

namespace {

template <class Key, class Bank>
__global__ void __launch_bounds__(kEnqueueThreads)
    enqueue_kernel(const __grid_constant__ EnqueueArgs args) {
    enqueue_rows<Key, Bank>(args);
}

}  // namespace

void enqueue(const EnqueueRequest& request) {
    if (request.batch == 0) return;
    const DeviceGuard guard(request.device);
    EnqueueArgs args = {request.keys,        request.labels,   request.ids,   request.bank,
                        request.bank_labels, request.bank_ids, request.ptr,   request.count,
                        request.ticket,      request.batch,    request.slots, int(request.dim)};
    const void* kernel = visit_dtype(request.key_dtype, [&](auto key) {
        return visit_dtype(request.bank_dtype, [](auto bank) {
            return reinterpret_cast<const void*>(
                enqueue_kernel<typename decltype(key)::type, typename decltype(bank)::type>);
        });
    });
    const int64_t blocks = (request.batch + kEnqueueThreads / 32 - 1) / (kEnqueueThreads / 32);
    void* arguments[] = {&args};
    launch(kernel, "enqueue", int(std::min<int64_t>(blocks, 1024)), kEnqueueThreads, 0,
           request.stream, arguments);
}

}  // namespace psm::cuda
