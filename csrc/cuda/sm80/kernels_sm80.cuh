// The kernels for sm_80 and newer: block sizes by dtype and padded D, and which serves which bank.
// Shared memory stays below the 99 KB that a block of sm_86, 89 and 120 can have, but for those of
// Sm80Large.
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
    using Wide = WideSm80<T, 16, 3>;
    using WideMine = MineSm80<PassSm80<T, 64, 8, 64, 4>>;
};
// For the 163 KB of sm_80 and 227 KB of sm_90 and 100: a tile of D = 256 serves 128 rows, not 64, and
// every scheduler has two warps. At smaller D more slots or stages would save no copy and no read.
template <class T>
struct Sm80Large : Sm80<T> {
    using Dim256 = PassSm80<T, 256, 8, 32, 4>;
};
static_assert(Sm80Large<BFloat16>::Dim256::kSharedBytes <= kLargeShared);

template <>
struct Sm80<float> {
    using Dim64 = PassFp32<64, 4, 32, 3>;
    using Dim128 = PassFp32<128, 4, 32, 3>;
    using Dim256 = PassFp32<256, 4, 32, 2>;
    using Dim512 = PassFp32<512, 4, 16, 2>;
    using Wide = PassFp32<kMaxDim, 8, 16, 2, 4>;
    using WideMine = MineSm80<PassFp32<64, 4, 32, 3>>;
};

template <class Config, Selection kSelection, Work kWork>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_pass_sm80(const __grid_constant__ KernelArgs args) {
    follow_previous();
    for (int item = block_index(); item < args.row_blocks * args.splits; item += grid_size()) {
        walk_bank<Config, kSelection, kWork>(args, dynamic_shared, item % args.row_blocks,
                                             item / args.row_blocks);
        block_sync();  // the next item overwrites shared memory
    }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bank_topk_sm80(const __grid_constant__ KernelArgs args) {
    follow_previous();
    for (int item = block_index(); item < args.row_blocks * args.splits; item += grid_size()) {
        Config::run(args, dynamic_shared, item % args.row_blocks, item / args.row_blocks);
        block_sync();
    }
}

template <class Family>
PassKernel find_sm80(Selection selection, Work work, int dim) {
    if (work == Work::kMine) {
        const auto mines = [](auto config) {
            using Config = typename decltype(config)::type;
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kMine>,
                                  "bank_topk (sm_80)");
        };
        if (dim > 512) {
            using Config = typename Family::WideMine;
            return handle<Config>(bank_topk_sm80<Config>, "bank_topk (sm_80, wide)");
        }
        return dim > 256 ? mines(Type<typename Family::Dim512>{})
                         : visit_width<Family>(dim, mines);
    }
    const auto passes = [&](auto config) {
        using Config = typename decltype(config)::type;
        if (work == Work::kProducts)
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kProducts>,
                                  "null bank_pass (sm_80)");
        if (work == Work::kBiased)
            return handle<Config>(bank_pass_sm80<Config, Selection::kAll, Work::kBiased>,
                                  "bank_pass with a bias (sm_80)");
        if (selection == Selection::kAffine)
            return handle<Config>(bank_pass_sm80<Config, Selection::kAffine, Work::kPass>,
                                  "weighted_pass");
        return visit_selection(selection, [&](auto chosen) {
            return handle<Config>(bank_pass_sm80<Config, decltype(chosen)::value, Work::kPass>,
                                  "bank_pass (sm_80)");
        });
    };
    return dim > kNarrowDim ? passes(Type<typename Family::Wide>{})
                            : visit_width<Family>(dim, passes);
}

}  // namespace psm::cuda
