// After mining, one CTA per row: the exact top-k. The k best slots lie in the k cells with the
// largest maxima (a slot outside has k better ones, ties going to the smaller slot), so those cells
// are looked at again, in fp32. Where four cells share a group, three of them may tie with a fourth
// and hold later slots: k + 3 cells. Hidden slots are in no maximum, and are not looked at here.
#pragma once

#include "hidden.cuh"
#include "reduce.cuh"
#include "select.cuh"

namespace psm::cuda {

constexpr int kDotLanes = 8;  // threads that share a dot product

struct MinedArgs {
    KernelArgs pass;
    Hidden next;  // of the sums, which must not see what is mined; flags null: they see it
    uint64_t* cell_keys;  // (grid, power_of_two(chosen cells))
    uint64_t* slot_keys;  // (grid, power_of_two(k))
    float* scores;        // (grid, chosen cells << cell_log2)
};

// So many cells can matter.
PSM_HD int64_t most_cells(int64_t topk, int cell_group) { return topk + cell_group - 1; }
PSM_HD int chosen_cells(int64_t topk, int cells, const KernelArgs& args) {
    const int64_t most = most_cells(topk, args.cell_group);
    return int(most < cells ? most : cells);
}

// Where few slots are mined, what their row needs fits shared memory: 24 cells of 64 slots.
constexpr int kFewScores = kFew << kCellLog2;
PSM_HD bool few_mined(const KernelArgs& args) {
    const int64_t most = most_cells(args.options.topk, args.cell_group);
    return most <= kFew && most << args.cell_log2 <= kFewScores;
}

// Slots of a cell, in base 2. A pass writes one maximum per 64 slots. On Hopper it balances the
// maxima of a cell (4 bytes, written once, and read once by select_few() or by about four passes of
// select_largest()) against the rows of k + 3 cells that are read again: 16 slots for k = 5 of
// 65,536 x 128, 4 for k = 200 of 50,000 x 512.
PSM_HD int choose_cell_log2(int64_t topk, int64_t dim, int64_t slots, int cell_group) {
    int log2 = kCellLog2;
    if (cell_group > 1) {
        const int64_t most = most_cells(topk, cell_group);
        const int64_t again = (most < slots ? most : slots) * dim;
        const int64_t once = most <= kFew ? 4 : 10;
        for (log2 = 2; again << (2 * log2 + 1) <= once * slots;) ++log2;
    }
    while ((slots - 1) >> log2 >= kMaxCells) ++log2;
    return log2;
}

// left . right[m] in fp32 by kDotLanes neighbouring threads, in a fixed order. Several at once, so
// that their reads of memory are under way together.
template <int kMany, class T>
PSM_DEVICE void dots(float (&sum)[kMany], const T* left, const T* const (&right)[kMany], int dim,
                     bool aligned, int lane) {
    constexpr int kVector = 16 / sizeof(T);
    struct alignas(16) Vector {
        T x[kVector];
    };
#pragma unroll 2
    for (int d = lane * kVector; d < dim; d += kDotLanes * kVector) {
        if (aligned) {
            Vector b[kMany];
            const Vector a = *reinterpret_cast<const Vector*>(left + d);
#pragma unroll
            for (int m = 0; m < kMany; ++m) b[m] = *reinterpret_cast<const Vector*>(right[m] + d);
#pragma unroll
            for (int m = 0; m < kMany; ++m)
#pragma unroll
                for (int i = 0; i < kVector; ++i)
                    sum[m] = fmaf(to_float(a.x[i]), to_float(b[m].x[i]), sum[m]);
        } else {
            for (int i = d; i < d + kVector && i < dim; ++i)
#pragma unroll
                for (int m = 0; m < kMany; ++m)
                    sum[m] = fmaf(to_float(left[i]), to_float(right[m][i]), sum[m]);
        }
    }
#pragma unroll
    for (int m = 0; m < kMany; ++m)
        for (int mask = 1; mask < kDotLanes; mask *= 2) sum[m] += shuffle_xor(sum[m], mask);
}

struct MinedShared {
    SelectScratch select;
    uint64_t cell_keys[kFew], keys[kFew];
    float scores[kFewScores];
};

// kFewMined, see few_mined(): all in shared memory; else what a row makes lies in the workspace.
template <class T, bool kFewMined>
PSM_DEVICE void mine_row(const MinedArgs& args, int row, MinedShared& shared) {
    const KernelArgs& pass = args.pass;
    const int topk = int(pass.options.topk), dim = pass.dim();
    const int thread = thread_index(), count = valid_slots(pass);
    const int lead = lead_slots(pass.options.col_offset), cell_slots = 1 << pass.cell_log2;
    const int cells = cell_count(count, lead, pass);
    const int room = chosen_cells(topk, pass.cells, pass);
    const int chosen = chosen_cells(topk, cells, pass);
    const int n = chosen << pass.cell_log2;
    uint64_t *cell_keys, *keys;
    float* scores;
    if constexpr (kFewMined) {
        cell_keys = shared.cell_keys, keys = shared.keys, scores = shared.scores;
    } else {
        cell_keys = args.cell_keys + int64_t(block_index()) * power_of_two(room);
        keys = args.slot_keys + int64_t(block_index()) * power_of_two(topk);
        scores = args.scores + (int64_t(block_index()) * room << pass.cell_log2);
    }

    const float* best = pass.cell_max + int64_t(row) * pass.cells;
    const auto cell_key = [&](int i) { return select_key(float_bits(best[i]), uint32_t(i)); };
    if constexpr (kFewMined) {
        select_few(cells, chosen, cell_key, cell_keys, shared.select);
    } else if (chosen > 0) {
        select_largest<false>(cells, chosen, cell_key, cell_keys, shared.select);
    }

    const auto slot_at = [&](int i) {  // of the i-th score, outside [0, count) where there is none
        const uint64_t key = cell_keys[i >> pass.cell_log2];
        const int slot = cell_slot(int(key_position(key)), i & (cell_slots - 1), pass) - lead;
        return key == 0 ? -1 : slot;
    };
    const T* left = static_cast<const T*>(pass.query) + int64_t(row) * dim;
    constexpr int kMany = 4, kTogether = kRowThreads / kDotLanes;
    for (int first = 0; first < n; first += kMany * kTogether) {
        const T* right[kMany];
        bool inside[kMany];
        float score[kMany] = {};
#pragma unroll
        for (int m = 0; m < kMany; ++m) {
            const int i = first + m * kTogether + thread / kDotLanes;
            const int slot = i < n ? slot_at(i) : -1;
            inside[m] = slot >= 0 && slot < count && !is_hidden(pass, row, slot);
            right[m] = static_cast<const T*>(pass.bank.rows) + int64_t(inside[m] ? slot : 0) * dim;
        }
        dots(score, left, right, dim, pass.aligned, thread % kDotLanes);
#pragma unroll
        for (int m = 0; m < kMany; ++m) {
            const int i = first + m * kTogether + thread / kDotLanes;
            if (thread % kDotLanes == 0 && i < n) scores[i] = inside[m] ? score[m] : -INFINITY;
        }
    }
    block_sync();
    const auto score_key = [&](int i) {
        return select_key(float_bits(scores[i]), uint32_t(slot_at(i)));
    };
    if constexpr (kFewMined) {
        select_few(n, topk, score_key, keys, shared.select);
    } else {
        select_largest<true>(n, topk, score_key, keys, shared.select);
    }
    for (int i = thread; i < topk; i += kRowThreads) {
        const int64_t at = int64_t(row) * topk + i;
        pass.topk_sim[at] = keys[i] == 0 ? -INFINITY : bits_float(key_value_bits(keys[i]));
        const int slot = keys[i] == 0 ? -1 : int(key_position(keys[i]));
        pass.topk_index[at] = slot;
        if (args.next.flags == nullptr) continue;
        const int64_t last = int64_t(row + 1) * args.next.listed - topk;
        args.next.list[last + i] = slot < 0 ? kNoSlot : slot;
        if (slot >= 0) set_flag(args.next, row, slot + lead);
    }
    block_sync();
}

template <class T>
PSM_DEVICE void mine_rows(const MinedArgs& args, MinedShared& shared) {
    const bool few = few_mined(args.pass);
    for (int row = block_index(); row < args.pass.rows(); row += grid_size()) {
        if (few) {
            mine_row<T, true>(args, row, shared);
        } else {
            mine_row<T, false>(args, row, shared);
        }
    }
}

}  // namespace psm::cuda
