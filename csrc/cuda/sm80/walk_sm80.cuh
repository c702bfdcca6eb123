// The bank pass for sm_80 and newer around the products of pass_sm80.cuh or pass_fp32.cuh. A CTA
// owns 16 rows per warp and walks the tiles of its split; all threads copy, some tiles ahead:
//
//     tile t is there (wait, barrier) -> copy t + kStages - 1 into the stage that t - 1 leaves
//     -> query . M -> what is hidden becomes -inf -> cell maxima, or weights -> P . M
#pragma once

#include "../common/cells.cuh"
#include "../common/epilogue.cuh"

namespace psm::cuda {

template <class Pass, Selection kSelection, Work kWork>
PSM_DEVICE void walk_bank(const KernelArgs& args, char* shared, int block, int split) {
    const int thread = thread_index(), lane = thread % 32;
    const int first_row = block * Pass::kRows + thread / 32 * 16 + lane / 4;
    const int row[2] = {first_row, first_row + 8};
    const Walk walk = walk_of(args, Pass::kTileSlots, split);
    const auto stage = [&](int tile) {
        return shared + Pass::kRingStart + tile % Pass::kStages * Pass::kStageBytes;
    };
    const auto load = [&](int tile) {
        if (tile < walk.tiles)
            Pass::load_bank(args, stage(tile), walk.start(tile) - walk.lead, walk.end - walk.lead,
                            thread);
        copy_commit();
    };
    Pass::load_rows(args, shared, int64_t(block) * Pass::kRows, thread);
    for (int tile = 0; tile < Pass::kStages - 1; ++tile) load(tile);

    Rows rows;
    NoiseKey noise;
    uint32_t column = 0;
    if constexpr (kWork != Work::kMine) start_rows<kSelection>(args, row, rows, noise, column);
    float out[Pass::kOut][4] = {};
    Masks<Pass::kTileSlots> masks(args, row, walk);
    int gone[2] = {};
    CellMax best(args, row, walk);
    for (int tile = 0; tile < walk.tiles; ++tile) {
        copy_wait<Pass::kStages - 2>();
        block_sync();  // the tile is there for all, and all are done with the one before
        load(tile + Pass::kStages - 1);
        float s[Pass::kTiles][4] = {};
        Pass::add_products(s, args, row, shared, stage(tile), thread);
        if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
        if constexpr (kWork == Work::kMine) {
            best.take(s);
        } else {
            Weights<typename Pass::Element, Pass::kTiles> weights;
            epilogue<kSelection, kWork>(s, out, args, rows, noise,
                                        column + uint32_t(walk.start(tile) / 4), weights);
            Pass::accumulate(out, weights, stage(tile), lane);
        }
    }
    copy_wait<0>();
    if constexpr (kWork == Work::kMine)
        best.close();
    else
        write_partial<kSelection>(args, rows, gone, out, row, split);
}

}  // namespace psm::cuda
