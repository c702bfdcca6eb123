#include <immintrin.h>

#include "../../philox.h"
#include "task.h"

#define PSM_QUADS 0
#define PSM_PAIRS 0

namespace psm::cpu {
namespace {
#include "scalar.inl"
#include "../simd/avx2.h"
using namespace simd;
#include "kernel.inl"
constexpr Kernels kKernels{"avx2", false, false, unit_rows, prepare, process,
                           merge_mean, similarities, gradient};
}  // namespace

const Kernels* avx2_kernels() {
    const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    return runs ? &kKernels : nullptr;
}
}  // namespace psm::cpu
