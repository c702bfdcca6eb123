// What the kernels take at most.
#pragma once

namespace psm::cuda {

constexpr int kMaxDim = 768;  // of a pass: four warps must hold 16 x D accumulators
constexpr int kNarrowDim = 256;  // and one warp; wider, Hopper runs the kernels of sm_80 too
constexpr int kMaxTopkDim = 4096;  // of mining, which has none
constexpr int kMaxStepTopk = 64;  // of psm_step

}  // namespace psm::cuda
