#include "../common/enqueue.cuh"

#include "call.h"

namespace psm::cuda {

namespace {

template <class Key, class Row>
__global__ void __launch_bounds__(kWarpRowThreads)
    enqueue_kernel(const __grid_constant__ EnqueueArgs args) {
    enqueue_rows<Key, Row>(args);
}

__global__ void advance_kernel(const __grid_constant__ EnqueueArgs args) { advance(args); }

}  // namespace

void enqueue(const EnqueueArgs& given, const Place& place) {
    if (given.batch == 0) return;
    EnqueueArgs args = given;
    const Call call(place);
    const void* kernel = visit_dtype(args.key_dtype, [&](auto key) {
        return visit_dtype(args.bank.dtype, [](auto row) {
            return reinterpret_cast<const void*>(
                enqueue_kernel<typename decltype(key)::type, typename decltype(row)::type>);
        });
    });
    call.launch(kernel, "enqueue", warp_row_grid(args.batch), kWarpRowThreads, 0, args);
    call.launch(reinterpret_cast<const void*>(advance_kernel), "advance", 1, 1, 0, args);
}

}  // namespace psm::cuda
