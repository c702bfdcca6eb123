// AVX-512 (F, BW, DQ, VL; VNNI under QUADS, BF16 under PAIRS) as the kernels see it; portable.h says
// what each means.
#include <immintrin.h>

namespace simd {

constexpr int kWidth = 16;
constexpr int kPanels = 4;  // 6 x 4 accumulators, 4 bank vectors, 1 query: 29 of 32 registers

using V = __m512;
using W = __m512i;  // 64-bit lanes of which the low halves count

INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V abs(V a) { return _mm512_abs_ps(a); }
INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }
INLINE float largest(V a) { return _mm512_reduce_max_ps(a); }
INLINE bool any_above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
INLINE uint64_t at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE V load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE V load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void split_bf16(const uint32_t* p, V& low, V& high) {
    const __m512i x = _mm512_loadu_si512(p);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000u))));
}
INLINE void split_fp16(const uint32_t* p, V& low, V& high) {
    const __m512i x = _mm512_loadu_si512(p);
    low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
    high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}

INLINE V shift_to_exponent(V a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
}

INLINE V keep(V s, const uint32_t* words, V threshold, uint64_t& kept, int at) {
    const __mmask16 mask = _mm512_cmplt_epu32_mask(_mm512_loadu_si512(words),
                                                   _mm512_cvttps_epu32(threshold));
    kept |= uint64_t(mask) << at;
    return _mm512_mask_mov_ps(set1(-kInfinity), mask, s);
}

INLINE W load_w(const uint64_t* p) { return _mm512_loadu_si512(p); }
INLINE void store_w(uint64_t* p, W x) { _mm512_storeu_si512(p, x); }
INLINE W set1_w(uint32_t x) { return _mm512_set1_epi64(x); }
INLINE W mul_w(W a, W b) { return _mm512_mul_epu32(a, b); }
INLINE W high_w(W a) { return _mm512_srli_epi64(a, 32); }
INLINE W xor_w(W a, W b) { return _mm512_xor_si512(a, b); }
INLINE W xor3_w(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
INLINE W join_w(W low, W high) {
    return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_ENUM(0xA0));
}
// The words of kWidth / 2 consecutive counters in the order of their slots.
INLINE void store_words(uint32_t* words, int counter, W first, W second) {
    uint32_t* p = words + 4 * counter;
    _mm512_storeu_si512(p, _mm512_shuffle_i64x2(first, second, 0x44));
    _mm512_storeu_si512(p + 16, _mm512_shuffle_i64x2(first, second, 0xEE));
}

constexpr int kTransposed = 16;
// dst[c][0..15] = src[0..15][c] for four columns c.
INLINE void transpose(const uint32_t* src, int64_t ld, uint32_t* dst, int64_t dst_ld) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {  // lane l of r[i] is four columns of row 4 l + i
        const uint32_t* p = src + i * ld;
        __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 4 * ld)), 1);
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 8 * ld)), 2);
        r[i] = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 12 * ld)), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_storeu_si512(dst, _mm512_unpacklo_epi64(a, c));
    _mm512_storeu_si512(dst + dst_ld, _mm512_unpackhi_epi64(a, c));
    _mm512_storeu_si512(dst + 2 * dst_ld, _mm512_unpacklo_epi64(b, d));
    _mm512_storeu_si512(dst + 3 * dst_ld, _mm512_unpackhi_epi64(b, d));
}

// Lanes of 32 bits, not __m512i: GCC 12 keeps an array of accumulators in registers only if its
// type is the one that the instruction returns.
typedef int32_t I __attribute__((vector_size(64)));
INLINE I load_i(const void* p) { return (I)_mm512_loadu_si512(p); }
INLINE void store_i(void* p, I x) { _mm512_storeu_si512(p, (__m512i)x); }
INLINE I set1_i(uint32_t x) { return (I)_mm512_set1_epi32(x); }

#if QUADS
INLINE V quantize(V x, int8_t* bytes) {
    const __m512i q = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)bytes, _mm512_cvtsepi32_epi8(q));
    return _mm512_cvtepi32_ps(q);
}
INLINE I dot_bytes(I acc, I u, I s) {
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
}
INLINE V to_float(I x) { return _mm512_cvtepi32_ps((__m512i)x); }
#endif

#if PAIRS
INLINE V dot_pairs(V acc, I a, I b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
INLINE void store_pairs(uint32_t* p, V first, V second) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
// (first, second) of each lane, both bf16 values already.
INLINE void store_interleaved(uint32_t* p, V first, V second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(second)));
}
#endif

}  // namespace simd
