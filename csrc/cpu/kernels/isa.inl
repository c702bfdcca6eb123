// The kernels compiled for one instruction set. isa_*.cpp name it: ISA, its header SIMD, and which
// packed forms it multiplies, bytes (QUADS) and bf16 (PAIRS).
#include "../../philox.h"
#include "task.h"

namespace psm::cpu {
namespace {
#include "scalar.inl"
#include SIMD
using namespace simd;
#include "kernel.inl"
constexpr Kernels kKernels{ISA,     QUADS,      PAIRS,        unit_rows, prepare,
                           process, merge_mean, similarities, gradient,  enqueue_row};
}  // namespace
}  // namespace psm::cpu
