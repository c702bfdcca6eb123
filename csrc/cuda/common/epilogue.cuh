// What happens to a tile of similarities between two products: noise, mask, exponentials, sums.
//
// A thread of an accumulator owns rows g and g + 8 of its warp's 16 (g = lane / 4) and, of every 8
// slots, 2 c and 2 c + 1 (c = lane % 4): s[n][0], s[n][1] in row g, s[n][2], s[n][3] in row g + 8
// (PTX ISA, m16n8 and wgmma D fragments alike). The issue slots of these loops are the speed of the
// library; tests/test_cuda_sass.py counts them.
#pragma once

#include "hidden.cuh"
#include "noise.cuh"

namespace psm::cuda {

// A weight above this moves the row's shift: P stays exact in fp16, its square far from overflow.
constexpr float kWeightMax = 4096.0f;

// P as the product with the bank takes it: A fragments of 16 slots, or fp32 as it is.
template <class T, int kTiles>
struct Weights {
    uint32_t p[kTiles / 2][4];
    PSM_DEVICE void set(int n, int row, float x, float y) {
        p[n / 2][n % 2 * 2 + row] = pack<T>(x, y);
    }
};
template <int kTiles>
struct Weights<float, kTiles> {
    float p[kTiles][4];
    PSM_DEVICE void set(int n, int row, float x, float y) {
        p[n][2 * row] = x, p[n][2 * row + 1] = y;
    }
};

// The two rows of a thread.
struct Rows {
    float scale, sharpness;  // of KernelArgs, kept where the inner loop wants them
    float center[2];  // -sharpness (s_pos + b); affine: alpha
    float beta[2], gamma[2], cap[2];  // affine alone
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

// log2 of the keep probability
PSM_DEVICE float keep_log2(const Rows& rows, float s, int row) {
    const float d = fmaf(s, rows.sharpness, rows.center[row]);
    return fminf(-d * d, -0.0014434169f);  // log2 kKeepMax
}

// Dropped elements of two n8 tiles become -inf. `column` is the Philox counter of their 16 slots.
template <int kTiles>
PSM_DEVICE void draw(float (&s)[kTiles][4], int n, const KernelArgs& args, Rows& rows,
                     const NoiseKey& key, uint32_t column) {
    const NoiseColumn at = noise_column(key, column);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const Philox4 noise = noise_words(key, rows.noise[row], at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& x = s[n + i / 2][2 * row + i % 2];
            const float d = fmaf(x, rows.sharpness, rows.center[row]);
            keep_below(noise.word[i], scaled_threshold(exp2_fast(-d * d), kKeepMax), x,
                       rows.kept[row]);
        }
    }
}

// Weights 2^(s scale - shift) of two n8 tiles and their sums.
template <class T, int kTiles>
PSM_DEVICE void exponentiate(const float (&s)[kTiles][4], int n, float scale, const Rows& rows,
                             Weights<T, kTiles>& weights, float (&sum)[2], float (&square)[2]) {
#pragma unroll
    for (int tile = n; tile < n + 2; ++tile)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float e[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                e[i] = exp2_fast(fmaf(s[tile][2 * row + i], scale, -rows.shift[row]));
                sum[row] += e[i];
                square[row] = fmaf(e[i], e[i], square[row]);
            }
            weights.set(tile, row, e[0], e[1]);
        }
}

template <int kOut>
PSM_DEVICE void rescale(float (&out)[kOut][4], Rows& rows, const float (&factor)[2]) {
    for (int row = 0; row < 2; ++row) rows.sum[row] *= factor[row];
#pragma unroll
    for (int n = 0; n < kOut; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
}

// Moves the shift of the rows that need it to their largest logit. Rare: the first tile of a row,
// and whenever a logit is 12 above all before. `s` still holds the similarities.
template <class T, int kTiles, int kOut>
PSM_DEVICE void move_shift(const float (&s)[kTiles][4], float (&out)[kOut][4], float scale,
                           Rows& rows, Weights<T, kTiles>& weights, float (&sum)[2],
                           float (&square)[2]) {
    float factor[2];
    for (int row = 0; row < 2; ++row) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
            top = fmaxf(top, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
        const bool moves = quad_max(sum[row]) > kWeightMax;
        top = quad_max(top) * scale;
        factor[row] = moves ? exp2_fast(rows.shift[row] - top) : 1.0f;
        rows.shift[row] = moves ? top : rows.shift[row];
        rows.square[row] *= factor[row] * factor[row];
        sum[row] = square[row] = 0;
    }
    rescale(out, rows, factor);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) exponentiate(s, n, scale, rows, weights, sum, square);
}

// "bernoulli" and "all": every element that is left weighs 1.
template <Selection kSelection, class T, int kTiles, int kOut>
PSM_DEVICE void weigh(float (&s)[kTiles][4], float (&out)[kOut][4], const KernelArgs& args,
                      Rows& rows, const NoiseKey& key, uint32_t column,
                      Weights<T, kTiles>& weights) {
    float sum[2] = {}, square[2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        if constexpr (kSelection == Selection::kBernoulli)
            draw(s, n, args, rows, key, column + 2 * n);
        exponentiate(s, n, rows.scale, rows, weights, sum, square);
    }
    if (warp_any(fmaxf(sum[0], sum[1]) > kWeightMax))
        move_shift(s, out, rows.scale, rows, weights, sum, square);
    for (int row = 0; row < 2; ++row) {
        rows.sum[row] += sum[row];
        rows.square[row] += square[row];
    }
}

// "expected": weight p. Its logit is s / tau + log p. The sum of squares has a shift of its own,
// because p exp(2 s / tau) can be large where p exp(s / tau) is negligible.
template <class T, int kTiles, int kOut>
PSM_DEVICE void weigh_expected(float (&s)[kTiles][4], float (&out)[kOut][4], const KernelArgs& args,
                               Rows& rows, Weights<T, kTiles>& weights) {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float top = -INFINITY, square_top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 2 * row; i < 2 * row + 2; ++i) {
                const float log_p = keep_log2(rows, s[n][i], row);
                const float p = exp2_subnormal(log_p);
                rows.count[row] += p;
                if (p == 0) s[n][i] = -INFINITY;
                const float logit = fmaf(s[n][i], rows.scale, log_p);
                top = fmaxf(top, logit);
                square_top = fmaxf(square_top, fmaf(s[n][i], rows.scale, logit));
            }
        top = fmaxf(rows.shift[row], quad_max(top));
        square_top = fmaxf(rows.square_shift[row], quad_max(square_top));
        factor[row] = exp2_fast(rows.shift[row] - top);
        rows.square[row] *= exp2_fast(rows.square_shift[row] - square_top);
        rows.shift[row] = top;
        rows.square_shift[row] = square_top;
    }
    rescale(out, rows, factor);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float e[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = s[n][2 * row + i];
                const float logit = fmaf(x, rows.scale, keep_log2(rows, x, row));
                rows.square[row] +=
                    exp2_fast(fmaf(x, rows.scale, logit) - rows.square_shift[row]);
                e[i] = exp2_fast(logit - rows.shift[row]);
                rows.sum[row] += e[i];
            }
            weights.set(n, row, e[0], e[1]);
        }
}

// "affine": weight w = max(alpha + beta s + gamma min(e, cap) + rho, 0) of e = 2^(logit - shift),
// whose shift is given: no e exceeds 1. `slot` is the thread's first one, counted from slot 0.
template <class T, int kTiles>
PSM_DEVICE void weigh_affine(const float (&s)[kTiles][4], const KernelArgs& args, Rows& rows,
                             int slot, Weights<T, kTiles>& weights) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        float rho[2], p[4];
        for (int i = 0; i < 2; ++i) {  // slots that are not there: any rho, and no weight below
            const int64_t at = slot + 8 * n + i;
            rho[i] = args.rho[at < 0 ? 0 : at < args.bank.slots ? at : args.bank.slots - 1];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2;
            const float e = exp2_fast(fmaf(s[n][i], rows.scale, -rows.shift[r]));
            const float line = fmaf(rows.beta[r], s[n][i], rows.center[r] + rho[i % 2]);
            float w = fmaf(rows.gamma[r], fminf(e, rows.cap[r]), line);
            w = w < 0 || s[n][i] == -INFINITY ? 0.0f : w;  // NaN stays
            rows.count[r] += w;
            rows.sum[r] += p[i] = w * e;
        }
        weights.set(n, 0, p[0], p[1]);
        weights.set(n, 1, p[2], p[3]);
    }
}

// What the two rows of a thread and its columns start from.
template <Selection kSelection>
PSM_DEVICE void start_rows(const KernelArgs& args, const int (&row)[2], Rows& rows, NoiseKey& key,
                           uint32_t& column) {
    column = thread_index() % 4;
    rows.scale = bits_float(keep_uniform(float_bits(args.scale)));
    rows.sharpness = bits_float(keep_uniform(float_bits(args.sharpness), 2));
    for (int r = 0; r < 2; ++r) {
        const bool inside = row[r] < args.batch;
        if constexpr (kSelection == Selection::kAffine) {
            const auto load = [&](int which) {
                return inside ? args.affine[int64_t(which) * args.batch + row[r]] : 0.0f;
            };
            rows.center[r] = load(0), rows.beta[r] = load(1), rows.gamma[r] = load(2);
            rows.shift[r] = fmaxf(load(3) * args.scale, kLowest), rows.cap[r] = load(4);
        } else if constexpr (kSelection != Selection::kAll) {
            rows.center[r] = -args.sharpness * ((inside ? args.s_pos[row[r]] : 0.0f) + args.options.b);
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
        weigh_expected(s, out, args, rows, weights);
    } else if constexpr (kSelection == Selection::kAffine) {  // column is slot / 4 + lane % 4
        const int slot = int(4 * column) - 2 * (thread_index() % 4) - lead_slots(args.options.col_offset);
        weigh_affine(s, args, rows, slot, weights);
    } else {
        weigh<kSelection>(s, out, args, rows, key, column, weights);
    }
}

// Writes what a thread holds of one (row block, split): sums by the first lane of each quad, means
// by all. Rows of means are padded to no more than D columns.
template <Selection kSelection, int kOut>
PSM_DEVICE void write_partial(const KernelArgs& args, const Rows& rows, const int (&gone)[2],
                              const float (&out)[kOut][4], const int (&row)[2], int split) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(rows.sum[r]), square = quad_sum(rows.square[r]);
        const int kept = kSelection == Selection::kAll ? -gone[r] : rows.kept[r];  // of all slots
        const float count = quad_sum(rows.count[r] + float(kept));
        if (row[r] >= args.batch) continue;
        const int64_t at = int64_t(split) * args.batch + row[r];
        const int c = thread_index() % 4;
        const float square_shift = kSelection == Selection::kExpected ? rows.square_shift[r]
                                                                      : 2 * rows.shift[r];
        if (c == 0) args.sums[at] = {rows.shift[r], sum, square_shift, square, count};
        float* mean = args.means + at * args.dim();
#pragma unroll
        for (int n = 0; n < kOut; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 8 * n + 2 * c + i;
                if (column < args.dim()) mean[column] = out[n][2 * r + i];
            }
    }
}

}  // namespace psm::cuda
