// What the kernels take at most.
#pragma once

namespace psm::cuda {

constexpr int kMaxDim = 256;  // of a pass: its (16, D) accumulators per warp must fit registers
constexpr int kMaxTopkDim = 4096;  // of bank_topk, which has none
constexpr int kMaxStepTopk = 64;  // of psm_step

}  // namespace psm::cuda
