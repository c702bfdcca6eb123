// From a tile of similarities to weights of P and their sums: noise, mask, exponentials. The issue
// slots of these loops are the speed of the library; tests/test_cuda_sass.py counts them. Which
// elements a thread owns: epilogue.cuh.
#pragma once

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
PSM_DEVICE void sample(float (&s)[kTiles][4], int n, Rows& rows, const NoiseKey& key,
                       uint32_t column) {
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
PSM_DEVICE void weigh(float (&s)[kTiles][4], float (&out)[kOut][4], Rows& rows,
                      const NoiseKey& key, uint32_t column, Weights<T, kTiles>& weights) {
    float sum[2] = {}, square[2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        if constexpr (kSelection == Selection::kBernoulli)
            sample(s, n, rows, key, column + 2 * n);
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
PSM_DEVICE void weigh_expected(float (&s)[kTiles][4], float (&out)[kOut][4], Rows& rows,
                               Weights<T, kTiles>& weights) {
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

// Of values (K,) that of a slot, or any where there is no such slot.
PSM_DEVICE float at_slot(const float* values, const KernelArgs& args, int64_t slot) {
    return values[slot < 0 ? 0 : slot < args.bank.slots ? slot : args.bank.slots - 1];
}

// tau times the bias of its slot to each similarity, that of what is hidden stays -inf. -inf hides
// the slot, and is not counted. `slot` as below.
template <int kTiles>
PSM_DEVICE void add_bias(float (&s)[kTiles][4], const KernelArgs& args, Rows& rows, int slot) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float bias = at_slot(args.slot_bias, args, slot + 8 * n + i % 2);
            float& x = s[n][i];
            const bool there = x != -INFINITY;
            rows.count[i / 2] -= float(there && bias == -INFINITY);
            x = there ? fmaf(args.options.temperature, bias, x) : x;
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
        for (int i = 0; i < 2; ++i)  // slots that are not there: any rho, and no weight below
            rho[i] = at_slot(args.rho, args, slot + 8 * n + i);
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

}  // namespace psm::cuda
