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
#include "finish.inl"
constexpr Kernels kKernels{"portable", false, false, prepare, process, read_mined, combine};
}  // namespace

const Kernels* portable_kernels() { return &kKernels; }
}  // namespace psm::cpu
