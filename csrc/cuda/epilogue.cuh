// What happens to a tile of similarities between two products: noise, keep mask, exponentials, sums.
//
// A thread of an accumulator owns rows g and g + 8 of its warp's 16 (g = lane / 4) and, of every 8
// slots, 2 c and 2 c + 1 (c = lane % 4): s[n][0], s[n][1] in row g, s[n][2], s[n][3] in row g + 8
// (PTX ISA, m16n8 and wgmma D fragments alike). The issue slots of these loops are the speed of the
// library; tests/test_cuda_sass.py counts them.
#pragma once

#include "noise.cuh"

namespace psm::cuda {

constexpr float kRescaleAbove = 8.0f;  // 2^8 keeps P exact in fp16 and its square far from overflow

// The two rows of a thread.
struct Rows {
    float center[2];  // -sharpness (s_pos + b)
    NoiseRow noise[2];
    float shift[2] = {kLowest, kLowest}, square_shift[2] = {kLowest, kLowest};
    float sum[2] = {}, square[2] = {}, count[2] = {};
    int kept[2] = {};
};

PSM_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
PSM_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int kTiles>
PSM_DEVICE void tile_max(const float (&s)[kTiles][4], float (&top)[2]) {
    for (int row = 0; row < 2; ++row) top[row] = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
}

// Slots of a tile that are not there become -inf.
template <int kTiles>
PSM_DEVICE void mask_slots(float (&s)[kTiles][4], const Walk& walk, int tile) {
    if (walk.whole(tile)) return;
    const int own = walk.start(tile) + 2 * (thread_index() % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int slot = own + 8 * n + i % 2;
            if (slot < walk.lead || slot >= walk.end) s[n][i] = -INFINITY;
        }
}

// log2 of the keep probability
PSM_DEVICE float keep_log2(const PassArgs& args, float s, float center) {
    const float d = fmaf(s, args.sharpness, center);
    return fminf(-d * d, kKeepMaxLog2);
}

// Dropped elements become -inf. `column` is the Philox counter of the tile's first 16 slots.
template <int kTiles>
PSM_DEVICE void draw(float (&s)[kTiles][4], const PassArgs& args, Rows& rows, const NoiseKey& key,
                     uint32_t column) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        const NoiseColumn at = noise_column(key, column + 2 * n);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const Philox4 noise = noise_words(key, rows.noise[row], at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = s[n + i / 2][2 * row + i % 2];
                const float d = fmaf(x, args.sharpness, rows.center[row]);
                // floor(p 2^32), the comparison word < floor(p 2^32) in integers; NaN keeps nothing
                const float p = exp2_fast(min_nan(fmaf(-d, d, 32.0f), 32.0f + kKeepMaxLog2));
                const bool keep = noise.word[i] < to_uint32(p);
                rows.kept[row] += keep;
                x = keep ? x : -INFINITY;
            }
        }
    }
}

// Moves the shift of a row to its largest logit, but only if that grew by more than kRescaleAbove.
// Returns whether any row of the warp moved; then `factor` is what old sums are multiplied by.
PSM_DEVICE bool move_shift(float (&shift)[2], const float (&top)[2], float (&factor)[2]) {
    bool moves[2];
    for (int row = 0; row < 2; ++row) moves[row] = top[row] > shift[row] + kRescaleAbove;
    if (!warp_any(moves[0] || moves[1])) return false;
    for (int row = 0; row < 2; ++row) {
        factor[row] = moves[row] ? exp2_fast(shift[row] - top[row]) : 1.0f;
        shift[row] = moves[row] ? top[row] : shift[row];
    }
    return true;
}

template <int kOut>
PSM_DEVICE void rescale(float (&out)[kOut][4], Rows& rows, const float (&factor)[2]) {
    for (int row = 0; row < 2; ++row) rows.sum[row] *= factor[row];
#pragma unroll
    for (int n = 0; n < kOut; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
}

// Packs two n8 accumulator tiles as one A fragment, the layout of P for the product with the bank.
template <class T>
PSM_DEVICE void pack_tile(const float (&low)[4], const float (&high)[4], uint32_t (&p)[4]) {
    p[0] = pack<T>(low[0], low[1]);
    p[1] = pack<T>(low[2], low[3]);
    p[2] = pack<T>(high[0], high[1]);
    p[3] = pack<T>(high[2], high[3]);
}

// "bernoulli" and "all": every element that is left weighs 1. s becomes the weights of P.
template <int kTiles, int kOut>
PSM_DEVICE void exponentiate(float (&s)[kTiles][4], float (&out)[kOut][4], const PassArgs& args,
                             Rows& rows) {
    float top[2], factor[2];
    tile_max(s, top);
    for (int row = 0; row < 2; ++row) top[row] = quad_max(top[row]) * args.scale;
    if (move_shift(rows.shift, top, factor)) {
        rescale(out, rows, factor);
        for (int row = 0; row < 2; ++row) rows.square[row] *= factor[row] * factor[row];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2;
            const float e = exp2_fast(fmaf(s[n][i], args.scale, -rows.shift[row]));
            rows.sum[row] += e;
            rows.square[row] = fmaf(e, e, rows.square[row]);
            s[n][i] = e;
        }
}

// "expected": weight p. Its logit is s / tau + log p, and the sum of squares has a shift of its own,
// because p exp(2 s / tau) can be large where p exp(s / tau) is negligible.
template <int kTiles, int kOut>
PSM_DEVICE void exponentiate_expected(float (&s)[kTiles][4], float (&out)[kOut][4],
                                      const PassArgs& args, Rows& rows) {
    float top[2] = {-INFINITY, -INFINITY}, square_top[2] = {-INFINITY, -INFINITY}, factor[2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2;
            const float log_p = keep_log2(args, s[n][i], rows.center[row]);
            const float p = exp2_subnormal(log_p);
            rows.count[row] += p;
            if (p == 0) s[n][i] = -INFINITY;
            const float logit = fmaf(s[n][i], args.scale, log_p);
            top[row] = fmaxf(top[row], logit);
            square_top[row] = fmaxf(square_top[row], fmaf(s[n][i], args.scale, logit));
        }
    for (int row = 0; row < 2; ++row) {
        top[row] = quad_max(top[row]);
        square_top[row] = quad_max(square_top[row]);
    }
    if (move_shift(rows.shift, top, factor)) rescale(out, rows, factor);
    if (move_shift(rows.square_shift, square_top, factor))
        for (int row = 0; row < 2; ++row) rows.square[row] *= factor[row];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2;
            const float log_p = keep_log2(args, s[n][i], rows.center[row]);
            const float logit = fmaf(s[n][i], args.scale, log_p);
            rows.square[row] +=
                exp2_fast(fmaf(s[n][i], args.scale, logit) - rows.square_shift[row]);
            s[n][i] = exp2_fast(logit - rows.shift[row]);
            rows.sum[row] += s[n][i];
        }
}

// What the two rows of a thread and its columns start from.
template <Selection kSelection>
PSM_DEVICE void start_rows(const PassArgs& args, const int (&row)[2], Rows& rows, NoiseKey& key,
                           uint32_t& column) {
    if constexpr (kSelection == Selection::kAll) return;
    for (int r = 0; r < 2; ++r) {
        const float s_pos = row[r] < args.batch ? args.s_pos[row[r]] : 0.0f;
        rows.center[r] = -args.sharpness * (s_pos + args.b);
    }
    if constexpr (kSelection == Selection::kBernoulli) {
        const auto seed = uint64_t(args.rng_state[0]), offset = uint64_t(args.rng_state[1]);
        key = {warp_uniform(uint32_t(seed)), warp_uniform(uint32_t(seed >> 32)),
               warp_uniform(uint32_t(offset)), warp_uniform(uint32_t(offset >> 32))};
        for (int r = 0; r < 2; ++r)
            rows.noise[r] = noise_row(key, uint32_t(args.row_offset + row[r]));
        const int64_t start = args.col_offset - lead_slots(args.col_offset);
        column = uint32_t(start / 16) * 4 + thread_index() % 4;
    }
}

// Similarities in, weights of P out, sums and `out` kept up to date.
template <Selection kSelection, Work kWork, int kTiles, int kOut>
PSM_DEVICE void epilogue(float (&s)[kTiles][4], float (&out)[kOut][4], const PassArgs& args,
                         Rows& rows, const NoiseKey& key, uint32_t column) {
    if constexpr (kWork == Work::kProducts) {
        return;
    } else if constexpr (kSelection == Selection::kExpected) {
        exponentiate_expected(s, out, args, rows);
    } else {
        if constexpr (kSelection == Selection::kBernoulli) draw(s, args, rows, key, column);
        exponentiate(s, out, args, rows);
    }
}

// Running maximum of the open cell of each of the two rows, written when the cell is through.
struct CellMax {
    float top[2] = {-INFINITY, -INFINITY};

    template <int kTiles>
    PSM_DEVICE void take(const float (&s)[kTiles][4], const PassArgs& args, const int (&row)[2],
                         const Walk& walk, int tile) {
        constexpr int kUnit = kTiles < 8 ? kTiles : 8;  // n8 tiles of the smallest cell
#pragma unroll
        for (int unit = 0; unit < kTiles; unit += kUnit) {
            const int after = walk.start(tile) + 8 * (unit + kUnit);
            if (after - 8 * kUnit >= walk.end) return;
#pragma unroll
            for (int n = unit; n < unit + kUnit; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
            if ((after & ((1 << args.cell_log2) - 1)) != 0 && after < walk.end) continue;
            const int cell = (after - 1) >> args.cell_log2;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float best = quad_max(top[r]);
                if (thread_index() % 4 == 0 && row[r] < args.batch)
                    args.cell_max[int64_t(row[r]) * args.cells + cell] = best;
                top[r] = -INFINITY;
            }
        }
    }
};

// Writes what a thread holds of one (row block, split): sums by the first lane of each quad, means
// by all. Rows of means are padded to no more than D columns.
template <Selection kSelection, int kOut>
PSM_DEVICE void write_partial(const PassArgs& args, const Rows& rows, const float (&out)[kOut][4],
                              const int (&row)[2], int split) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(rows.sum[r]), square = quad_sum(rows.square[r]);
        const float count = quad_sum(rows.count[r] + float(rows.kept[r]));
        if (row[r] >= args.batch) continue;
        const int64_t at = int64_t(split) * args.batch + row[r];
        const int c = thread_index() % 4;
        const float square_shift = kSelection == Selection::kExpected ? rows.square_shift[r]
                                                                      : 2 * rows.shift[r];
        if (c == 0) args.sums[at] = {rows.shift[r], sum, square_shift, square, count};
        float* mean = args.means + at * args.dim;
#pragma unroll
        for (int n = 0; n < kOut; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 8 * n + 2 * c + i;
                if (column < args.dim) mean[column] = out[n][2 * r + i];
            }
    }
}

}  // namespace psm::cuda
