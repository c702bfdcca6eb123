// The kernels for sm_90a: block sizes by padded D, and which serves which bank. Shared memory takes
// up to 224 KB of the 227 KB of a block.
#pragma once

#include "../common/kernels.h"
#include "mine_sm90.cuh"
#include "pass_sm90.cuh"

namespace psm::cuda {

template <class T>
struct Sm90 {  // slots of a tile, stages
    using Dim64 = PassSm90<T, 64, 128, 6>;
    using Dim128 = PassSm90<T, 128, 128, 6>;
    using Dim256 = PassSm90<T, 256, 64, 5>;
};

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm90(const __grid_constant__ KernelArgs args,
                   const __grid_constant__ TensorMaps maps) {
    Config::template run<kSelection, kWork>(args, maps, dynamic_shared);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_topk_sm90(const __grid_constant__ KernelArgs args,
                   const __grid_constant__ TensorMaps maps) {
    Config::run(args, maps, dynamic_shared);
}

template <class Config, class Function>
PassKernel handle_sm90(Function* function, const char* name) {
    PassKernel kernel = handle<Config>(function, name);
    kernel.tensor_maps = true;
    return kernel;
}

template <class T>
PassKernel find_sm90(Selection selection, Work work, int dim) {
    if (work == Work::kMine) {
        const auto mines = [](auto config) {
            using Config = typename decltype(config)::type;
            PassKernel kernel = handle_sm90<Config>(bank_topk_sm90<Config>, "bank_topk (sm_90a)");
            kernel.cell_group = 4;
            return kernel;
        };
        return dim <= 512 ? mines(Type<MineSm90<T, false>>{}) : mines(Type<MineSm90<T, true>>{});
    }
    return visit_width<Sm90<T>>(dim, [&](auto config) {
        using Config = typename decltype(config)::type;
        if (work == Work::kProducts)
            return handle_sm90<Config>(bank_pass_sm90<Config, Selection::kAll, Work::kProducts>,
                                       "null bank_pass (sm_90a)");
        if (work == Work::kInTurns)
            return handle_sm90<Config>(
                bank_pass_sm90<Config, Selection::kBernoulli, Work::kInTurns>,
                "bank_pass in turns (sm_90a)");
        return visit_selection(selection, [&](auto chosen) {
            return handle_sm90<Config>(
                bank_pass_sm90<Config, decltype(chosen)::value, Work::kPass>,
                "bank_pass (sm_90a)");
        });
    });
}

}  // namespace psm::cuda
