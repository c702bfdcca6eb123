// Mining in a tile of similarities: the largest of each cell of slots is all that is kept. Who owns
// which element: epilogue.cuh.
#pragma once

#include "hidden.cuh"

namespace psm::cuda {

// Raises the tops of the two rows by 8 x kUnit slots. Positive floats are in order as integers, and
// sm_90 finds the largest of three integers at once. Where the result is negative, infinite or NaN,
// it is found again as a float.
template <int kUnit, int kTiles>
PSM_DEVICE void raise_tops(float (&top)[2], const float (&s)[kTiles][4], int unit) {
    int best[2] = {int(float_bits(top[0])), int(float_bits(top[1]))};
#pragma unroll
    for (int n = unit; n < unit + kUnit; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            best[r] = max_of_three(best[r], int(float_bits(s[n][2 * r])),
                                   int(float_bits(s[n][2 * r + 1])));
    const auto plain = [](int x) { return uint32_t(x) < 0x7F800000u; };
    if (warp_any(!plain(best[0]) || !plain(best[1]))) {
#pragma unroll
        for (int n = unit; n < unit + kUnit; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
    } else {
        for (int r = 0; r < 2; ++r) top[r] = bits_float(best[r]);
    }
}

// Running maximum of the open cell of each of the two rows, written when the cell is through.
struct CellMax {
    float* cell;  // the last one written of row `lane % 2`
    bool odd;
    int cell_slots, open;  // slots that the open cell has left
    float top[2] = {-INFINITY, -INFINITY};

    PSM_DEVICE CellMax(const KernelArgs& args, const int (&row)[2], const Walk& walk)
        : odd(thread_index() % 2),
          cell_slots(int(keep_uniform(1u << args.cell_log2))),
          open(cell_slots) {
        const int own = odd ? row[1] : row[0];
        cell = args.cell_max + int64_t(own < args.rows() ? own : args.rows()) * args.cells +
               (walk.start(0) >> args.cell_log2) - 1;
    }

    template <int kTiles>
    PSM_DEVICE void take(const float (&s)[kTiles][4]) {
        constexpr int kUnit = kTiles < 8 ? kTiles : 8;  // n8 tiles of the smallest cell
#pragma unroll
        for (int unit = 0; unit < kTiles; unit += kUnit) {
            raise_tops<kUnit>(top, s, unit);
            open -= 8 * kUnit;
            if (open == 0) write();
        }
    }
    PSM_DEVICE void close() {
        if (open < cell_slots) write();
    }

    PSM_DEVICE void write() {
        float best = odd ? top[1] : top[0];  // each lane keeps one row and sends the other
        best = fmaxf(best, shuffle_xor(odd ? top[0] : top[1], 1));
        *++cell = fmaxf(best, shuffle_xor(best, 2));
        top[0] = top[1] = -INFINITY;
        open = cell_slots;
    }
};

// Running maxima of the open cells of a thread's two rows. A cell is the thread's own slots in a
// group, so that no thread waits for another.
struct QuadCells {
    float* cell[2];  // the last ones written
    int group, open;  // slots of a group, and those that the open one has left
    float top[2] = {-INFINITY, -INFINITY};

    PSM_DEVICE QuadCells(const KernelArgs& args, const int (&row)[2], const Walk& walk)
        : group(group_slots(args)), open(group) {
        for (int r = 0; r < 2; ++r)
            cell[r] = args.cell_max +
                      int64_t(row[r] < args.rows() ? row[r] : args.rows()) * args.cells +
                      walk.start(0) / group * 4 + thread_index() % 4 - 4;
    }
    template <int kTiles>
    PSM_DEVICE void take(const float (&s)[kTiles][4]) {
        if (group >= 64) {
#pragma unroll
            for (int n = 0; n < kTiles; n += 8) {
                raise_tops<8>(top, s, n);
                open -= 64;
                if (open == 0) write();
            }
            return;
        }
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {  // 16 slots, the smallest group
#pragma unroll
            for (int i = 0; i < 8; ++i)
                top[i % 4 / 2] = fmaxf(top[i % 4 / 2], s[n + i / 4][i % 4]);
            open -= 16;
            if (open == 0) write();
        }
    }
    PSM_DEVICE void close() {
        if (open < group) write();
    }
    PSM_DEVICE void write() {
        for (int r = 0; r < 2; ++r) {
            *(cell[r] += 4) = top[r];
            top[r] = -INFINITY;
        }
        open = group;
    }
};

}  // namespace psm::cuda
