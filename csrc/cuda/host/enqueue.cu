#include "../common/enqueue.cuh"

#include "call.h"

namespace psm::cuda {

namespace {

template <class Key, class Row>
__global__ void __launch_bounds__(kWarpRowThreads)
    enqueue_kernel(const __grid_constant__ EnqueueArgs args) {
    enqueue_rows<Key, Row>(args);
}

const void* find_enqueue(Dtype key_dtype, Dtype bank_dtype) {
    return visit_dtype(key_dtype, [&](auto key) {
        return visit_dtype(bank_dtype, [](auto row) {
            return reinterpret_cast<const void*>(
                enqueue_kernel<typename decltype(key)::type, typename decltype(row)::type>);
        });
    });
}

}  // namespace

void load_enqueues() {
    constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
    for (Dtype key : kDtypes)
        for (Dtype row : kDtypes) load(find_enqueue(key, row), "enqueue");
}

void enqueue(const EnqueueArgs& given, const Place& place) {
    if (given.batch == 0) return;
    EnqueueArgs args = given;
    const Call call(place);
    call.launch(find_enqueue(args.key_dtype, args.bank.dtype), "enqueue",
                warp_row_grid(args.batch), kWarpRowThreads, 0, args);
}

}  // namespace psm::cuda
