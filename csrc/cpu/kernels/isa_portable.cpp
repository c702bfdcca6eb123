#define ISA "portable"
#define SIMD "../simd/portable.h"
#define QUADS 0
#define PAIRS 0
#include "isa.inl"

const psm::cpu::Kernels* psm::cpu::portable_kernels() { return &kKernels; }
