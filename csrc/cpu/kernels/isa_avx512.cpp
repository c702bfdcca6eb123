#include <immintrin.h>

#include "../../philox.h"
#include "task.h"

#define PSM_QUADS 1
#define PSM_PAIRS 0

namespace psm::cpu {
namespace {
#include "scalar.inl"
#include "../simd/avx512.h"
using namespace simd;
#include "kernel.inl"
constexpr Kernels kKernels{"avx512", true, false, unit_rows, prepare, process,
                           merge_mean, similarities, gradient};
}  // namespace

const Kernels* avx512_kernels() {
    const bool runs =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
    return runs ? &kKernels : nullptr;
}
}  // namespace psm::cpu
