// The kernels for sm_80 and newer: block sizes by dtype and padded D, and which serves which bank.
// Shared memory stays below the 99 KB that a block of sm_86, 89 and 120 can have.
#pragma once

#include "../common/kernels.h"
#include "mine_sm80.cuh"
#include "pass_fp32.cuh"
#include "pass_sm80.cuh"
#include "walk_sm80.cuh"

namespace psm::cuda {

template <class T>
struct Sm80 {  // rows 16 x warps, slots of a tile, stages
    using Dim64 = PassSm80<T, 64, 8, 64, 4>;
    using Dim128 = PassSm80<T, 128, 8, 64, 4>;
    using Dim256 = PassSm80<T, 256, 4, 32, 4>;
    using Dim512 = PassSm80<T, 512, 4, 16, 2>;
    using Wide = MineSm80<PassSm80<T, 64, 8, 64, 4>>;
};
template <>
struct Sm80<float> {
    using Dim64 = PassFp32<64, 4, 32, 3>;
    using Dim128 = PassFp32<128, 4, 32, 3>;
    using Dim256 = PassFp32<256, 4, 32, 2>;
    using Dim512 = PassFp32<512, 4, 16, 2>;
    using Wide = MineSm80<PassFp32<64, 4, 32, 3>>;
};

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm80(const __grid_constant__ KernelArgs args) {
    for (int item = block_index(); item < args.row_blocks * args.splits; item += grid_size()) {
        walk_bank<Config, kSelection, kWork>(args, dynamic_shared, item % args.row_blocks,
                                             item / args.row_blocks);
        block_sync();  // the next item overwrites shared memory
    }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_topk_sm80(const __grid_constant__ KernelArgs args) {
    for (int item = block_index(); item < args.row_blocks * args.splits; item += grid_size()) {
        Config::run(args, dynamic_shared, item % args.row_blocks, item / args.row_blocks);
        block_sync();
    }
}

template <class T>
PassKernel find_sm80(Selection selection, Work work, int dim) {
    if (work == Work::kMine) {
        const auto mines = [](auto config) {
            using Config = typename decltype(config)::type;
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kMine>,
                                  "bank_topk (sm_80)");
        };
        if (dim > 512) {
            using Config = typename Sm80<T>::Wide;
            return handle<Config>(bank_topk_sm80<Config>, "bank_topk (sm_80, wide)");
        }
        return dim > 256 ? mines(Type<typename Sm80<T>::Dim512>{})
                         : visit_width<Sm80<T>>(dim, mines);
    }
    return visit_width<Sm80<T>>(dim, [&](auto config) {
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

}  // namespace psm::cuda
