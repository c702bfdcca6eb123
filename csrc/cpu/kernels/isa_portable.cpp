#include "../../philox.h"
#include "task.h"

#define PSM_QUADS 0
#define PSM_PAIRS 0

namespace psm::cpu {
namespace {
#include "scalar.inl"
#include "../simd/portable.h"
using namespace simd;
#include "kernel.inl"
constexpr Kernels kKernels{"portable", false, false, unit_rows, prepare, process,
                           merge_mean, similarities, gradient};
}  // namespace

const Kernels* portable_kernels() { return &kKernels; }
}  // namespace psm::cpu
