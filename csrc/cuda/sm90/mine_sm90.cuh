// Mining for sm_90a: cell maxima of query . M. The bank comes in panels of 64 columns by 256 slots,
// whose products add up. Up to D = 512 the block's rows stay in shared memory; wider ones come in
// panels, too, each with that of the bank: 1.5 times the copies.
#pragma once

#include "../common/cells.cuh"
#include "pipeline_sm90.cuh"

namespace psm::cuda {

template <class T, bool kWide>
struct MineSm90 {
    static constexpr int kTileSlots = 256, kStages = kWide ? 4 : 3, kMaxPanels = kWide ? 0 : 8;
    static constexpr int kThreads = 384, kRows = 128;
    static constexpr int kTiles = kTileSlots / 8, kSteps = kPanelColumns / 16;
    static constexpr int kRowPanelBytes = kRows * kRowBytes;
    static constexpr int kStageRows = kWide ? kRowPanelBytes : 0;  // then the bank's
    static constexpr int kStageBytes = kStageRows + kTileSlots * kRowBytes;
    static constexpr int kRingStart = kMaxPanels * kRowPanelBytes;
    static constexpr int kBarriers = kRingStart + kStages * kStageBytes;
    static constexpr int kSharedBytes = kBarriers + Barriers<kStages>::kBytes;

    static PSM_DEVICE int panels_of(const KernelArgs& args) {
        return (args.dim() + kPanelColumns - 1) / kPanelColumns;
    }

    static PSM_DEVICE void run(const KernelArgs& args, const TensorMaps& maps, char* shared) {
        produce_and_consume<MineSm90>(args, maps, shared, [&](uint32_t base, const auto& barriers) {
            consume(args, base, barriers);
        });
    }

    // What TMA finds behind the last valid slot may be NaN: it stays in scores that become -inf.
    static PSM_DEVICE void produce(const KernelArgs& args, const TensorMaps& maps, uint32_t base,
                                   const Barriers<kStages>& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        const int panels = panels_of(args);
        const uint32_t first_stage = base + kRingStart - barriers.start * (kStageBytes / 8);
        Ring<kStages> ring(barriers);
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int first_row = item % args.row_blocks * kRows;
            const Walk walk = walk_of(args, kTileSlots, item / args.row_blocks);
            if constexpr (!kWide)
                barriers.wait(barriers.rows_empty(), rows_phase ^ 1, Waits::kRowsEmpty);
            rows_phase ^= 1;
            if (!kWide && lane == 0) {
                mbarrier_arrive_expect(barriers.rows_full(), panels * kRowPanelBytes);
                for (int panel = 0; panel < panels; ++panel)
                    tma_load(base + panel * kRowPanelBytes, &maps.query, barriers.rows_full(),
                             panel * kPanelColumns, first_row);
            }
            for (int tile = 0; tile < walk.tiles; ++tile) {
                for (int panel = 0; panel < panels; ++panel) {
                    barriers.wait(ring.empty(), ring.phase ^ 1, Waits::kEmpty);
                    if (lane == 0) {
                        const uint32_t target = first_stage + ring.full * (kStageBytes / 8);
                        const int column = panel * kPanelColumns;
                        mbarrier_arrive_expect(ring.full, kStageBytes);
                        if constexpr (kWide)
                            tma_load(target, &maps.query, ring.full, column, first_row);
                        tma_load(target + kStageRows, &maps.bank, ring.full, column,
                                 walk.start(tile) - walk.lead);
                    }
                    warp_sync();
                    ring.advance();
                }
            }
        }
    }

    static PSM_DEVICE void consume(const KernelArgs& args, uint32_t base,
                                   const Barriers<kStages>& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        const int panels = panels_of(args);
        // Where the panels of a stage would lie whose barrier had address 0, see Ring
        const uint32_t units = kStageBytes / kUnit / 8, back = 0 - barriers.start * units;
        const uint32_t group_rows = base + (thread_index() / 128 - 1) * kGroupRows * kRowBytes;
        const Descriptor rows = keep_uniform(
            descriptor(group_rows, 16, 8 * kRowBytes).moved(kWide ? back : 0), 1);
        const Descriptor slots = keep_uniform(
            descriptor(base + kRingStart + kStageRows, 16, 8 * kRowBytes).moved(back), 2);
        Ring<kStages> ring(barriers);
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int first_row = item % args.row_blocks * kRows + thread_index() / 32 * 16 - 64;
            const int row[2] = {first_row + lane / 4, first_row + lane / 4 + 8};
            const Walk walk = walk_of(args, kTileSlots, item / args.row_blocks);
            Masks<kTileSlots> masks(args, row, walk);
            int gone[2] = {};
            QuadCells best(args, row, walk);
            if constexpr (!kWide) barriers.wait(barriers.rows_full(), rows_phase, Waits::kRowsFull);
            rows_phase ^= 1;
            for (int tile = 0; tile < walk.tiles; ++tile) {
                float s[kTiles][4];
                uint32_t held = barriers.nobody();  // `empty` of a stage that products may read
                const auto multiply = [&](int panel, auto first) {
                    Descriptor a = rows.moved(kWide ? ring.full * units
                                                    : panel * (kRowPanelBytes / kUnit));
                    Descriptor b = slots.moved(ring.full * units);
                    barriers.wait(ring.full, ring.phase, Waits::kFull);
                    hide(a), hide(b);
                    hold_accumulators(s);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < kSteps; ++step)
                        wgmma<T>(s, a.at(step * 32), b.at(step * 32), !first.value || step > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                    hold_accumulators(s);
                    if (lane == 0) mbarrier_arrive(held);
                    held = ring.empty();
                    ring.advance();
                };
                multiply(0, std::true_type{});
                for (int panel = 1; panel < panels; ++panel) multiply(panel, std::false_type{});
                wgmma_wait<0>();
                hold_accumulators(s);
                if (lane == 0) mbarrier_arrive(held);
                if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
                best.take(s);
            }
            best.close();
            if (!kWide && lane == 0) mbarrier_arrive(barriers.rows_empty());
        }
    }
};

}  // namespace psm::cuda
