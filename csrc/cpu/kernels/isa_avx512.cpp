#include <immintrin.h>
#define ISA "avx512"
#define SIMD "../simd/avx512.h"
#define QUADS 0
#define PAIRS 0
#include "isa.inl"

const psm::cpu::Kernels* psm::cpu::avx512_kernels() {
    const bool runs =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("popcnt");
    return runs ? &kKernels : nullptr;
}
