#include <immintrin.h>
#define ISA "avx512_bf16"
#define SIMD "../simd/avx512.h"
#define QUADS 1
#define PAIRS 1
#include "isa.inl"

const psm::cpu::Kernels* psm::cpu::avx512_bf16_kernels() {
    const bool runs = avx512_vnni_kernels() != nullptr && __builtin_cpu_supports("avx512bf16");
    return runs ? &kKernels : nullptr;
}
