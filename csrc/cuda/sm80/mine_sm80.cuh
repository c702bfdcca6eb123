// Mining for sm_80 and newer at any D: cell maxima of query . M. Neither the block's rows nor a
// tile of the bank fit shared memory whole: panels of both come together, their products add up.
#pragma once

#include "../common/cells.cuh"

namespace psm::cuda {

// `Pass` is of one panel: its kDim columns.
template <class Pass>
struct MineSm80 {
    static constexpr int kTileSlots = Pass::kTileSlots, kThreads = Pass::kThreads;
    static constexpr int kRows = Pass::kRows, kColumns = Pass::kOut * 8, kStages = Pass::kStages;
    static constexpr int kPanelBytes = Pass::kRowTileBytes + Pass::kStageBytes;
    static constexpr int kSharedBytes = kStages * kPanelBytes;

    static PSM_DEVICE void run(const KernelArgs& args, char* shared, int block, int split) {
        const int thread = thread_index(), lane = thread % 32;
        const int panels = (args.dim() + kColumns - 1) / kColumns;
        const int first_row = block * kRows + thread / 32 * 16 + lane / 4;
        const int row[2] = {first_row, first_row + 8};
        const Walk walk = walk_of(args, kTileSlots, split);
        const auto panel_of = [&](int step) { return shared + step % kStages * kPanelBytes; };
        int next_tile = 0, next_panel = 0;  // to be loaded
        const auto load = [&](int step) {
            if (next_tile < walk.tiles) {
                const int left = next_panel * kColumns;
                char* place = panel_of(step);
                Pass::load_rows(args, place, int64_t(block) * kRows, thread, left);
                Pass::load_bank(args, place + Pass::kRowTileBytes,
                                walk.start(next_tile) - walk.lead, walk.end - walk.lead, thread,
                                left);
                if (++next_panel == panels) next_panel = 0, ++next_tile;
            }
            copy_commit();
        };
        for (int step = 0; step < kStages - 1; ++step) load(step);

        Masks<kTileSlots> masks(args, row, walk);
        int gone[2] = {}, step = 0;
        CellMax best(args, row, walk);
        for (int tile = 0; tile < walk.tiles; ++tile) {
            float s[Pass::kTiles][4] = {};
            for (int panel = 0; panel < panels; ++panel, ++step) {
                copy_wait<kStages - 2>();
                block_sync();  // the panel is there for all, and all are done with the one before
                load(step + kStages - 1);
                const char* place = panel_of(step);
                Pass::add_products(s, args, row, place, place + Pass::kRowTileBytes, thread,
                                   panel * kColumns);
            }
            if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
            best.take(s);
        }
        copy_wait<0>();
        best.close();
    }
};

}  // namespace psm::cuda
