// What happens to a tile of similarities between two products: noise, mask, exponentials, sums.
//
// A thread of an accumulator owns rows g and g + 8 of its warp's 16 (g = lane / 4) and, of every 8
// slots, 2 c and 2 c + 1 (c = lane % 4): s[n][0], s[n][1] in row g, s[n][2], s[n][3] in row g + 8
// (PTX ISA, m16n8 and wgmma D fragments alike).
#pragma once

#include "hidden.cuh"
#include "weigh.cuh"

namespace psm::cuda {

// What the two rows of a thread and its columns start from.
template <Selection kSelection>
PSM_DEVICE void start_rows(const KernelArgs& args, const int (&row)[2], Rows& rows, NoiseKey& key,
                           uint32_t& column) {
    column = thread_index() % 4;
    rows.scale = bits_float(keep_uniform(float_bits(args.scale)));
    rows.sharpness = bits_float(keep_uniform(float_bits(args.sharpness), 2));
    for (int r = 0; r < 2; ++r) {
        const bool inside = row[r] < args.rows();
        if constexpr (kSelection == Selection::kAffine) {
            const auto load = [&](int which) {
                return inside ? args.affine[int64_t(which) * args.rows() + row[r]] : 0.0f;
            };
            rows.center[r] = load(0), rows.beta[r] = load(1), rows.gamma[r] = load(2);
            rows.shift[r] = fmaxf(load(3) * args.scale, kLowest), rows.cap[r] = load(4);
        } else if constexpr (kSelection != Selection::kAll) {
            const float positive = inside ? args.s_pos[row[r]] : 0.0f;
            rows.center[r] = -args.sharpness * (positive + args.options.b);
        }
    }
    if constexpr (kSelection == Selection::kBernoulli) {
        const auto seed = uint64_t(args.rng_state[0]), offset = uint64_t(args.rng_state[1]);
        key = noise_key(seed, offset);
        for (int r = 0; r < 2; ++r)
            rows.noise[r] = noise_row(key, uint32_t(args.options.row_offset + row[r]));
        const int64_t start = args.options.col_offset - lead_slots(args.options.col_offset);
        column += uint32_t(start / 16) * 4;
    }
}

// The thread's first slot of a tile whose `column` is slot / 4 + lane % 4, counted from slot 0.
PSM_DEVICE int own_slot(const KernelArgs& args, uint32_t column) {
    const int lead = lead_slots(args.options.col_offset);
    return int(4 * column) - 2 * (thread_index() % 4) - lead;
}

// Similarities in, weights of P out, sums and `out` kept up to date.
template <Selection kSelection, Work kWork, class T, int kTiles, int kOut>
PSM_DEVICE void epilogue(float (&s)[kTiles][4], float (&out)[kOut][4], const KernelArgs& args,
                         Rows& rows, const NoiseKey& key, uint32_t column,
                         Weights<T, kTiles>& weights) {
    if constexpr (kWork == Work::kProducts) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int row = 0; row < 2; ++row)
                weights.set(n, row, s[n][2 * row], s[n][2 * row + 1]);
    } else if constexpr (kSelection == Selection::kExpected) {
        weigh_expected(s, out, rows, weights);
    } else if constexpr (kSelection == Selection::kAffine) {
        weigh_affine(s, args, rows, own_slot(args, column), weights);
    } else {
        if constexpr (kWork == Work::kBiased) add_bias(s, args, rows, own_slot(args, column));
        weigh<kSelection>(s, out, rows, key, column, weights);
    }
}

// Writes what a thread holds of one (row block, split): sums by the first lane of each quad, means
// by all. Rows of means are padded to no more than D columns. Where kShares warps share the rows,
// `out` has every kShares-th panel of 64 columns, from number `share` on.
template <Selection kSelection, int kShares = 1, int kOut>
PSM_DEVICE void write_partial(const KernelArgs& args, const Rows& rows, const int (&gone)[2],
                              const float (&out)[kOut][4], const int (&row)[2], int split,
                              int share = 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(rows.sum[r]), square = quad_sum(rows.square[r]);
        const int kept = kSelection == Selection::kAll ? -gone[r] : rows.kept[r];  // of all slots
        const float count = quad_sum(rows.count[r] + float(kept));
        if (row[r] >= args.rows()) continue;
        const int64_t at = int64_t(split) * args.rows() + row[r];
        const int c = thread_index() % 4;
        const float square_shift = kSelection == Selection::kExpected ? rows.square_shift[r]
                                                                      : 2 * rows.shift[r];
        if (c == 0 && share == 0) args.sums[at] = {rows.shift[r], sum, square_shift, square, count};
        float* mean = args.means + at * args.dim();
#pragma unroll
        for (int n = 0; n < kOut; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = (n / 8 * kShares + share) * 64 + n % 8 * 8 + 2 * c + i;
                if (column < args.dim()) mean[column] = out[n][2 * r + i];
            }
    }
}

}  // namespace psm::cuda
