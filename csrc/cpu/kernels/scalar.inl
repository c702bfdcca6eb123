// Scalar helpers, included inside the namespace of each instruction set: see task.h for why the
// standard library's templates are not used here.

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

constexpr float kInfinity = __builtin_inff();
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kLog2Cap = -0.00144341686f;  // log2(0.999): the keep probability is capped there
// 2^f on [-1/2, 1/2]: minimax of degree 5 with p(0) = 1, relative error 9e-8 before rounding.
constexpr float kExp2[6] = {1.0f,          0.693147f,     0.24022242f,
                            0.055507336f, 0.009671513f, 0.0013264727f};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE float power_of_two(float x) { return __builtin_exp2f(x); }

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}
INLINE float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
    const float tiny = float(magnitude) * 5.9604645e-8f;  // subnormal: units of 2^-24
    return sign ? -tiny : tiny;
}
// To the nearest number without the last kBits bits of the mantissa, ties to even.
template <int kBits>
INLINE float round_bits(float x) {
    const uint32_t bits = float_to_bits(x), odd = bits >> kBits & 1;
    const uint32_t nearest = bits + ((1u << (kBits - 1)) - 1 + odd);
    return x == x ? bits_to_float(nearest & ~((1u << kBits) - 1)) : x;
}
