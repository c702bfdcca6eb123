// After the sums, one CTA per row: partial sums of the splits added in a fixed order.
#pragma once

#include "limits.h"
#include "pass.cuh"
#include "reduce.cuh"

namespace psm::cuda {

constexpr int kMaxSplits = 1024;

struct MergeShared {
    float weight[kMaxSplits];
    float part[kRowThreads][4];  // of the means, see merge_means
    BlockValues values;
};
static_assert(kMaxDim <= 4 * kRowThreads);

struct alignas(16) Four {
    float x[4];
};

// mean += the weighted sums over every `step`-th split of four columns. Eight loads are under way at
// a time: with one, each of 64 splits would cost a round trip to L2, 0.3 us.
template <bool kAligned>
PSM_DEVICE void add_means(const KernelArgs& args, int row, int column, int first, int step,
                          const MergeShared& shared, float (&mean)[4]) {
    const int dim = args.dim();
    const float* means = args.means + int64_t(row) * dim + column;
#pragma unroll 8
    for (int split = first; split < args.splits; split += step) {
        const float* from = means + split * args.batch * dim;
        Four x = {};
        if constexpr (kAligned) {
            x = *reinterpret_cast<const Four*>(from);
        } else {
            for (int i = 0; i < 4 && column + i < dim; ++i) x.x[i] = from[i];
        }
        const float weight = shared.weight[split];
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[i] = fmaf(weight, x.x[i], mean[i]);
    }
}

// The means' sums over the splits, four columns to a thread: neighbours have neighbouring columns,
// and each part of the CTA every so many splits. Part 0 then adds what the parts have, in their
// order; true for its threads, which get the sums.
PSM_DEVICE bool merge_means(const KernelArgs& args, int row, MergeShared& shared, int& column,
                            float (&mean)[4]) {
    const int dim = args.dim(), fours = (dim + 3) / 4, parts = kRowThreads / fours;
    const int thread = thread_index(), part = thread / fours;
    column = thread % fours * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[i] = 0;
    const int first = part < parts ? part : args.splits;
    if (dim % 4 == 0) {
        add_means<true>(args, row, column, first, parts, shared, mean);
    } else {
        add_means<false>(args, row, column, first, parts, shared, mean);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.part[thread][i] = mean[i];
    block_sync();
    if (part > 0) return false;
    for (int other = 1; other < parts; ++other)
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[i] += shared.part[thread + other * fours][i];
    return true;
}

template <class T>
PSM_DEVICE void merge_row(const KernelArgs& args, int row, MergeShared& shared) {
    const int thread = thread_index(), dim = args.dim();
    float shift = kLowest, square_shift = kLowest;
#pragma unroll 1
    for (int split = thread; split < args.splits; split += kRowThreads) {
        const RowSums& part = args.sums[split * args.batch + row];
        shift = fmaxf(shift, part.shift);
        square_shift = fmaxf(square_shift, part.square_shift);
    }
    shift = block_max(shift, shared.values);
    square_shift = block_max(square_shift, shared.values);

    float sum = 0, square = 0, count = 0, spoiled = 0;
#pragma unroll 1
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
    int column;
    float mean[4];
    const bool has_sums = merge_means(args, row, shared, column, mean);
    const float spoiled_query = spoiled;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (!has_sums || column + i >= dim) continue;
        if (args.neg_mean != nullptr)
            args.neg_mean[int64_t(row) * dim + column + i] =
                (sum == 0 ? mean[i] : mean[i] / sum) + spoiled_query;
        spoiled += mean[i] * 0.0f;
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

inline int64_t row_grid(int64_t rows) { return rows < 1 << 16 ? rows : 1 << 16; }

}  // namespace psm::cuda
