// After the sums, one CTA per row: partial sums of the splits added in their order.
#pragma once

#include "mined.cuh"

namespace psm::cuda {

constexpr int kMaxSplits = 1024;

struct MergeArgs {
    PassArgs pass;
    float* neg_lse;     // (B,)
    float* neg_mean;    // (B, D)
    float* neg_sq_lse;  // (B,)
    float* neg_count;   // (B,)
};

struct MergeShared {
    float weight[kMaxSplits];
    float value[kMergeThreads / 32];
};

template <bool kMax>
PSM_DEVICE float block_reduce(float x, MergeShared& shared) {
    const auto join = [](float a, float b) { return kMax ? fmaxf(a, b) : a + b; };
    for (int mask = 16; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
    block_sync();  // the last result has been read
    if (thread_index() % 32 == 0) shared.value[thread_index() / 32] = x;
    block_sync();
    x = shared.value[0];
    for (int warp = 1; warp < kMergeThreads / 32; ++warp) x = join(x, shared.value[warp]);
    return x;
}

template <class T>
PSM_DEVICE void merge_row(const MergeArgs& args, int row, MergeShared& shared) {
    const PassArgs& pass = args.pass;
    const int thread = thread_index();
    float shift = kLowest, square_shift = kLowest;
    for (int split = thread; split < pass.splits; split += kMergeThreads) {
        const RowSums& part = pass.sums[int64_t(split) * pass.batch + row];
        shift = fmaxf(shift, part.shift);
        square_shift = fmaxf(square_shift, part.square_shift);
    }
    shift = block_reduce<true>(shift, shared);
    square_shift = block_reduce<true>(square_shift, shared);

    float sum = 0, square = 0, count = 0, spoiled = 0;
    for (int split = thread; split < pass.splits; split += kMergeThreads) {
        const RowSums& part = pass.sums[int64_t(split) * pass.batch + row];
        const float weight = exp2f(part.shift - shift);
        shared.weight[split] = weight;
        sum += weight * part.sum;
        square += exp2f(part.square_shift - square_shift) * part.square;
        count += part.count;
    }
    sum = block_reduce<false>(sum, shared);
    square = block_reduce<false>(square, shared);
    count = block_reduce<false>(count, shared);

    // A NaN or inf in the query or in a valid slot must show, though a mask drops NaN.
    const auto* query = static_cast<const T*>(pass.query) + int64_t(row) * pass.dim;
    for (int d = thread; d < pass.dim; d += kMergeThreads) spoiled += to_float(query[d]) * 0.0f;
    spoiled = block_reduce<false>(spoiled, shared);
    for (int d = thread; d < pass.dim; d += kMergeThreads) {
        float mean = 0;
#pragma unroll 8
        for (int split = 0; split < pass.splits; ++split) {
            const int64_t at = int64_t(split) * pass.batch + row;
            mean = fmaf(shared.weight[split], pass.means[at * pass.dim + d], mean);
        }
        args.neg_mean[int64_t(row) * pass.dim + d] = (sum == 0 ? mean : mean / sum) + spoiled;
        spoiled += mean * 0.0f;
    }
    spoiled = block_reduce<false>(spoiled, shared);
    if (thread == 0) {
        if (pass.selection == Selection::kAll) count += float(valid_slots(pass));  // minus hidden
        args.neg_lse[row] = (sum == 0 ? -INFINITY : (shift + log2f(sum)) * kLn2) + spoiled;
        args.neg_sq_lse[row] =
            (square == 0 ? -INFINITY : (square_shift + log2f(square)) * kLn2) + spoiled;
        args.neg_count[row] = count;
    }
    block_sync();
}

template <class T>
PSM_DEVICE void merge_rows(const MergeArgs& args, MergeShared& shared) {
    for (int row = block_index(); row < args.pass.batch; row += grid_size())
        merge_row<T>(args, row, shared);
}

}  // namespace psm::cuda
