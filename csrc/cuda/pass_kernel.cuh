// The __global__ functions around the passes of configs.cuh, and how to find the right one.
#pragma once

#include "configs.cuh"
#include "kernels.h"

namespace psm::cuda {

extern __shared__ __align__(1024) char dynamic_shared[];

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm80(const __grid_constant__ PassArgs args) {
    Config::template run<kSelection, kWork>(args, dynamic_shared);
}

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm90(const __grid_constant__ PassArgs args, const __grid_constant__ TensorMaps maps) {
    Config::template run<kSelection, kWork>(args, maps, dynamic_shared);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_topk_sm90(const __grid_constant__ PassArgs args, const __grid_constant__ TensorMaps maps) {
    Config::run(args, maps, dynamic_shared);
}

template <class Config, class Function>
PassKernel handle(Function* function, const char* name) {
    return {reinterpret_cast<const void*>(function), name, Config::kThreads, Config::kRows,
            Config::kTileSlots, Config::kSharedBytes};
}

template <class T>
PassKernel find_sm80(Selection selection, Work work, int dim) {
    if (work == Work::kMine) {
        return visit_mine<Sm80<T>>(dim, [&](auto config) {
            using Config = typename decltype(config)::type;
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kMine>,
                                  "bank_topk (sm_80)");
        });
    }
    return visit_pass<Sm80<T>>(dim, [&](auto config) {
        using Config = typename decltype(config)::type;
        if (work == Work::kProducts)
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kProducts>,
                                  "null bank_pass (sm_80)");
        if (selection == Selection::kAffine)
            return handle<Config>(bank_pass_sm80<Config, Selection::kAffine, Work::kPass>,
                                  "weighted_pass");
        return visit_selection(selection, [&](auto chosen) {
            return handle<Config>(bank_pass_sm80<Config, decltype(chosen)::value, Work::kPass>,
                                  "bank_pass (sm_80)");
        });
    });
}

template <class T>
PassKernel find_sm90(Selection selection, Work work, int dim) {
    if (work == Work::kMine) {
        using Config = MineSm90<T>;
        PassKernel kernel = handle<Config>(bank_topk_sm90<Config>, "bank_topk (sm_90a)");
        kernel.cell_group = 4;
        return kernel;
    }
    return visit_pass<Sm90<T>>(dim, [&](auto config) {
        using Config = typename decltype(config)::type;
        if (work == Work::kProducts)
            return handle<Config>(bank_pass_sm90<Config, Selection::kAll, Work::kProducts>,
                                  "null bank_pass (sm_90a)");
        return visit_selection(selection, [&](auto chosen) {
            return handle<Config>(bank_pass_sm90<Config, decltype(chosen)::value, Work::kPass>,
                                  "bank_pass (sm_90a)");
        });
    });
}

}  // namespace psm::cuda
