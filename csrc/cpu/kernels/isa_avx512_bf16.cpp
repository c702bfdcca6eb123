#include <immintrin.h>

#include "../../philox.h"
#include "task.h"

#define PSM_QUADS 1
#define PSM_PAIRS 1

namespace psm::cpu {
namespace {
#include "scalar.inl"
#include "../simd/avx512.h"
using namespace simd;
#include "kernel.inl"
constexpr Kernels kKernels{"avx512_bf16", true, true, unit_rows, prepare, process,
                           merge_mean, similarities, gradient};
}  // namespace

const Kernels* avx512_bf16_kernels() {
    const bool runs = avx512_kernels() != nullptr && __builtin_cpu_supports("avx512bf16");
    return runs ? &kKernels : nullptr;
}
}  // namespace psm::cpu
