// The __global__ functions around the passes of configs.cuh.
#pragma once

#include "configs.cuh"

namespace psm::cuda {

extern __shared__ __align__(1024) char dynamic_shared[];

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_kernel(const __grid_constant__ PassArgs args) {
    Config::template run<kSelection, kWork>(args, dynamic_shared);
}

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm90_kernel(const __grid_constant__ PassArgs args,
                          const __grid_constant__ TensorMaps maps) {
    Config::template run<kSelection, kWork>(args, maps, dynamic_shared);
}

}  // namespace psm::cuda
