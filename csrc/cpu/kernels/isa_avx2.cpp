#include <immintrin.h>
#define ISA "avx2"
#define SIMD "../simd/avx2.h"
#define QUADS 0
#define PAIRS 0
#include "isa.inl"

const psm::cpu::Kernels* psm::cpu::avx2_kernels() {
    const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    return runs ? &kKernels : nullptr;
}
