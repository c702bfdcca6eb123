// Sums and maxima over the threads of a warp, and of a block that has one row.
#pragma once

#include "primitives.cuh"

namespace psm::cuda {

constexpr int kRowThreads = 128;

template <class V>
PSM_DEVICE V warp_sum(V x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

struct BlockValues {
    float of_warp[kRowThreads / 32];
};

template <class Join>
PSM_DEVICE float block_reduce(float x, BlockValues& shared, Join join) {
    for (int mask = 16; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
    block_sync();  // the last result has been read
    if (thread_index() % 32 == 0) shared.of_warp[thread_index() / 32] = x;
    block_sync();
    x = shared.of_warp[0];
    for (int warp = 1; warp < kRowThreads / 32; ++warp) x = join(x, shared.of_warp[warp]);
    return x;
}
PSM_DEVICE float block_sum(float x, BlockValues& shared) {
    return block_reduce(x, shared, [](float a, float b) { return a + b; });
}
PSM_DEVICE float block_max(float x, BlockValues& shared) {
    return block_reduce(x, shared, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace psm::cuda
