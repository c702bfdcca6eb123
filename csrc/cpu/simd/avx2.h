// AVX2 with FMA and F16C as the kernels see it; portable.h says what each means.
#include <immintrin.h>

namespace simd {

constexpr int kWidth = 8;
constexpr int kPanels = 2;  // 6 x 2 accumulators, 2 bank vectors, 1 query: 15 of 16 registers

using V = __m256;
using W = __m256i;

INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
INLINE float sum(V a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float largest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE bool any_above(V a, V b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
INLINE uint64_t at_least(V a, V b) {
    return uint64_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
INLINE V load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE V load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
INLINE void split_bf16(const uint32_t* p, V& low, V& high) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p);
    low = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xFFFF0000u))));
}
INLINE void split_fp16(const uint32_t* p, V& low, V& high) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p);
    const __m256i even = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
    const __m256i packed = _mm256_packus_epi32(even, _mm256_srli_epi32(x, 16));
    const __m256i halves = _mm256_permute4x64_epi64(packed, 0xD8);  // all low, then all high
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

INLINE V shift_to_exponent(V a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}

INLINE V keep(V s, const uint32_t* words, V threshold, uint64_t& kept, int at) {
    // Unsigned conversion: above 2^31 through the signed one, then unsigned compare by the sign.
    const V half = set1(2147483648.0f);
    const __m256i sign = _mm256_set1_epi32(int(0x80000000u));
    const __m256i low = _mm256_xor_si256(_mm256_cvttps_epi32(threshold), sign);
    const __m256i high = _mm256_cvttps_epi32(sub(threshold, half));
    const V is_high = _mm256_cmp_ps(threshold, half, _CMP_GE_OQ);
    const __m256i bound = _mm256_blendv_epi8(low, high, _mm256_castps_si256(is_high));
    const __m256i word = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)words), sign);
    const V mask = _mm256_castsi256_ps(_mm256_cmpgt_epi32(bound, word));
    kept |= uint64_t(_mm256_movemask_ps(mask)) << at;
    return _mm256_blendv_ps(set1(-kInfinity), s, mask);
}

INLINE W load_w(const uint64_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store_w(uint64_t* p, W x) { _mm256_storeu_si256((__m256i*)p, x); }
INLINE W set1_w(uint32_t x) { return _mm256_set1_epi64x(x); }
INLINE W mul_w(W a, W b) { return _mm256_mul_epu32(a, b); }
INLINE W high_w(W a) { return _mm256_srli_epi64(a, 32); }
INLINE W xor_w(W a, W b) { return _mm256_xor_si256(a, b); }
INLINE W xor3_w(W a, W b, W c) { return xor_w(xor_w(a, b), c); }
INLINE W join_w(W low, W high) {
    return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
INLINE void store_words(uint32_t* words, int counter, W first, W second) {
    uint32_t* p = words + 4 * counter;
    _mm256_storeu_si256((__m256i*)p, first);
    _mm256_storeu_si256((__m256i*)(p + 8), second);
}

constexpr int kTransposed = 8;
INLINE void transpose(const uint32_t* src, int64_t ld, uint32_t* dst, int64_t dst_ld) {
    __m256i r[4];
    for (int i = 0; i < 4; ++i) {
        const uint32_t* p = src + i * ld;
        r[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
            _mm_loadu_si128((const __m128i*)(p + 4 * ld)), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    _mm256_storeu_si256((__m256i*)dst, _mm256_unpacklo_epi64(a, c));
    _mm256_storeu_si256((__m256i*)(dst + dst_ld), _mm256_unpackhi_epi64(a, c));
    _mm256_storeu_si256((__m256i*)(dst + 2 * dst_ld), _mm256_unpacklo_epi64(b, d));
    _mm256_storeu_si256((__m256i*)(dst + 3 * dst_ld), _mm256_unpackhi_epi64(b, d));
}

}  // namespace simd
