// After the sums, one CTA per row: partial sums of the splits added in their order.
#pragma once

#include "pass.cuh"
#include "reduce.cuh"

namespace psm::cuda {

constexpr int kMaxSplits = 1024;

struct MergeShared {
    float weight[kMaxSplits];
    BlockValues values;
};

template <class T>
PSM_DEVICE void merge_row(const KernelArgs& args, int row, MergeShared& shared) {
    const int thread = thread_index(), dim = args.dim();
    float shift = kLowest, square_shift = kLowest;
    for (int split = thread; split < args.splits; split += kRowThreads) {
        const RowSums& part = args.sums[split * args.batch + row];
        shift = fmaxf(shift, part.shift);
        square_shift = fmaxf(square_shift, part.square_shift);
    }
    shift = block_max(shift, shared.values);
    square_shift = block_max(square_shift, shared.values);

    float sum = 0, square = 0, count = 0, spoiled = 0;
    for (int split = thread; split < args.splits; split += kRowThreads) {
        const RowSums& part = args.sums[split * args.batch + row];
        const float weight = exp2f(part.shift - shift);
        shared.weight[split] = weight;
        sum += weight * part.sum;
        square += exp2f(part.square_shift - square_shift) * part.square;
        count += part.count;
    }
    sum = block_sum(sum, shared.values);
    square = block_sum(square, shared.values);
    count = block_sum(count, shared.values);

    // A NaN or inf in the query or in a valid slot must show, though a mask drops NaN.
    const auto* query = static_cast<const T*>(args.query) + int64_t(row) * dim;
    for (int d = thread; d < dim; d += kRowThreads) spoiled += to_float(query[d]) * 0.0f;
    spoiled = block_sum(spoiled, shared.values);
    for (int d = thread; d < dim; d += kRowThreads) {
        float mean = 0;
#pragma unroll 16  // reads of L2 that are under way together
        for (int split = 0; split < args.splits; ++split) {
            const int64_t at = split * args.batch + row;
            mean = fmaf(shared.weight[split], args.means[at * dim + d], mean);
        }
        if (args.neg_mean != nullptr)
            args.neg_mean[int64_t(row) * dim + d] = (sum == 0 ? mean : mean / sum) + spoiled;
        spoiled += mean * 0.0f;
    }
    spoiled = block_sum(spoiled, shared.values);
    if (thread == 0) {
        if (args.options.selection == Selection::kAll)
            count += float(valid_slots(args));  // so far it was less what is hidden
        args.neg_lse[row] = (sum == 0 ? -INFINITY : (shift + log2f(sum)) * kLn2) + spoiled;
        args.neg_sq_lse[row] =
            (square == 0 ? -INFINITY : (square_shift + log2f(square)) * kLn2) + spoiled;
        args.neg_count[row] = count;
    }
    block_sync();
}

template <class T>
PSM_DEVICE void merge_rows(const KernelArgs& args, MergeShared& shared) {
    for (int row = block_index(); row < args.rows(); row += grid_size())
        merge_row<T>(args, row, shared);
}

}  // namespace psm::cuda
