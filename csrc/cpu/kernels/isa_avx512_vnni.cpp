#include <immintrin.h>
#define ISA "avx512_vnni"
#define SIMD "../simd/avx512.h"
#define QUADS 1
#define PAIRS 0
#include "isa.inl"

const psm::cpu::Kernels* psm::cpu::avx512_vnni_kernels() {
    const bool runs = avx512_kernels() != nullptr && __builtin_cpu_supports("avx512vnni");
    return runs ? &kKernels : nullptr;
}
