// Four lanes in the vector extension of GCC and Clang: any processor, and the meaning of each
// operation for the other instruction sets.

namespace simd {

constexpr int kWidth = 4;    // floats in V
constexpr int kPanels = 2;   // V's per row of the register block

typedef float V __attribute__((vector_size(16)));
typedef int32_t Vi __attribute__((vector_size(16)));
typedef uint32_t Vu __attribute__((vector_size(16)));
typedef uint16_t Vh __attribute__((vector_size(8)));
typedef uint64_t W __attribute__((vector_size(16)));  // 64-bit lanes whose low halves count

template <class T>
INLINE T read(const void* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
template <class T>
INLINE void write(void* p, T x) {
    __builtin_memcpy(p, &x, sizeof x);
}

INLINE V load(const float* p) { return read<V>(p); }
INLINE void store(float* p, V x) { write(p, x); }
INLINE V set1(float x) { return V{x, x, x, x}; }
INLINE V add(V a, V b) { return a + b; }
INLINE V sub(V a, V b) { return a - b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V min(V a, V b) { return a < b ? a : b; }  // b where either is NaN
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V abs(V a) { return V(Vi(a) & 0x7FFFFFFF); }
INLINE float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE float largest(V a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}
INLINE bool any_above(V a, V b) {
    const Vi m = a > b;
    return (m[0] | m[1] | m[2] | m[3]) != 0;
}
INLINE uint64_t at_least(V a, V b) {  // bit per lane
    const Vi m = a >= b;
    return uint64_t((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
}
INLINE V load_bf16(const uint16_t* p) {
    return V(__builtin_convertvector(read<Vh>(p), Vu) << 16);
}
// The low and the high half of each lane.
INLINE void split_bf16(const uint32_t* p, V& low, V& high) {
    low = V(read<Vu>(p) << 16), high = V(read<Vu>(p) & 0xFFFF0000u);
}

// Whether four fp16 are neither zero or subnormal nor inf or NaN: one test, where a choice in each
// lane would take longer than the rest.
INLINE bool all_normal(uint64_t four) {
    constexpr uint64_t kEach = 0x0001000100010001;
    const uint64_t inside = (four & 0x7C00 * kEach) + 0x0400 * kEach;  // 0x0800 to 0x7C00
    return (((inside & 0x7800 * kEach) + 0x7800 * kEach) & 0x8000 * kEach) == 0x8000 * kEach;
}
INLINE V widen_normal(Vu x) {  // the fp16 in the high half of each lane
    return V((Vu(Vi(x) >> 3) & 0x8FFFE000u) + (112u << 23));
}
INLINE V load_fp16(const uint16_t* p) {
    if (all_normal(read<uint64_t>(p)))
        return widen_normal(__builtin_convertvector(read<Vh>(p), Vu) << 16);
    return V{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
INLINE void split_fp16(const uint32_t* p, V& low, V& high) {
    const Vu x = read<Vu>(p);
    if (all_normal(W(x)[0]) && all_normal(W(x)[1])) {
        low = widen_normal(x << 16), high = widen_normal(x);
        return;
    }
    for (int n = 0; n < kWidth; ++n) {
        low[n] = half_to_float(uint16_t(x[n]));
        high[n] = half_to_float(uint16_t(x[n] >> 16));
    }
}

INLINE V shift_to_exponent(V a) { return V(Vu(a) << 23); }

// s where word < floor(threshold), else -inf; a bit per lane goes to `kept`, the first to bit `at`.
INLINE V keep(V s, const uint32_t* words, V threshold, uint64_t& kept, int at) {
    const Vi mask = read<Vu>(words) < __builtin_convertvector(threshold, Vu);
    kept |= uint64_t((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8)) << at;
    return mask ? s : set1(-kInfinity);
}

INLINE W load_w(const uint64_t* p) { return read<W>(p); }
INLINE void store_w(uint64_t* p, W x) { write(p, x); }
INLINE W set1_w(uint32_t x) { return W{x, x}; }
INLINE W mul_w(W a, W b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
INLINE W high_w(W a) { return a >> 32; }
INLINE W xor_w(W a, W b) { return a ^ b; }
INLINE W xor3_w(W a, W b, W c) { return a ^ b ^ c; }
INLINE W join_w(W low, W high) { return (low & 0xFFFFFFFFu) | (high << 32); }
// Slots 16 n + 2 c + {0, 1} and + {8, 9} take the words of counter 4 n + c.
INLINE void store_words(uint32_t* words, int counter, W first, W second) {
    uint32_t* p = words + 16 * (counter / 4) + 2 * (counter % 4);
    write(p, first);
    write(p + 8, second);
}

constexpr int kTransposed = 4;
// dst[c][0..kTransposed - 1] = src[0..kTransposed - 1][c] for four columns c. A pair of 16-bit columns
// may be aligned to two bytes.
INLINE void transpose(const uint32_t* src, int64_t ld, uint32_t* dst, int64_t dst_ld) {
    for (int c = 0; c < 4; ++c)
        for (int r = 0; r < 4; ++r) dst[c * dst_ld + r] = read<uint32_t>(src + r * ld + c);
}

}  // namespace simd
