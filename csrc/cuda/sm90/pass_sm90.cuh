// The bank pass for sm_90a. Two warpgroups, A and B, take query . M (Q) and P . M (P) from the same
// bank tile by wgmma; pipeline_sm90.cuh says who else there is. The time line of tile t:
//
//     producer      | wait until `empty`  | TMA of a tile up to kStages ahead                   |
//     A             | wait: `full` of t   | wait: P(t-1), Q(t); leave t-1 | epilogue | start P(t)
//     B             | epilogue of t-1     | start P(t-1) | wait: `full` of t ...                |
//     tensor cores  | P(t-1), Q(t) of A   | P(t-1), Q(t) of B             | P(t), Q(t+1) of A   |
//
// Nothing but the waits, or with kInTurns their turns, puts B half a tile behind A: who finds the
// tensor cores busy comes later. So one group's epilogue runs while the other's products do.
#pragma once

#include "../common/epilogue.cuh"
#include "pipeline_sm90.cuh"

namespace psm::cuda {

template <class T, int kDim, int kSlots, int kRing>
struct PassSm90 {
    static constexpr int kTileSlots = kSlots, kStages = kRing;
    static constexpr int kThreads = 384, kRows = 128;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8, kSteps = kDim / 16;
    static constexpr int kPanels = kDim / kPanelColumns;
    static constexpr int kRowTileBytes = kRows * kDim * 2, kStageBytes = kTileSlots * kDim * 2;
    static constexpr int kBarriers = kRowTileBytes + kStages * kStageBytes;
    static constexpr int kSharedBytes = kBarriers + Barriers<kStages>::kBytes;
    static_assert(kTileSlots % 64 == 0 && kDim % kPanelColumns == 0);

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void run(const KernelArgs& args, const TensorMaps& maps, char* shared) {
        produce_and_consume<PassSm90>(args, maps, shared, [&](uint32_t base, const auto& barriers) {
            consume<kSelection, kWork>(args, base, barriers);
        });
    }

    static PSM_DEVICE void produce(const KernelArgs& args, const TensorMaps& maps, uint32_t base,
                                   const Barriers<kStages>& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        Ring<kStages> ring(barriers);
        const uint32_t first_stage = base + kRowTileBytes - barriers.start * (kStageBytes / 8);
        uint32_t rows_phase = 0, copied_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int first_row = item % args.row_blocks * kRows;
            const Walk walk = walk_of(args, kTileSlots, item / args.row_blocks);
            barriers.wait(barriers.rows_empty(), rows_phase ^ 1, Waits::kRowsEmpty);
            rows_phase ^= 1;
            if (lane == 0) {
                mbarrier_arrive_expect(barriers.rows_full(), kRowTileBytes);
                load_panels<kRows>(base, maps.query, barriers.rows_full(), first_row);
            }
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t target = first_stage + ring.full * (kStageBytes / 8);
                const int first = walk.start(tile) - walk.lead, left = walk.end - walk.start(tile);
                // Behind the last valid slot there may be NaN, which the consumers must not meet.
                const bool clears = left < kTileSlots;
                const uint32_t there = clears ? barriers.copied() : ring.full;
                barriers.wait(ring.empty(), ring.phase ^ 1, Waits::kEmpty);
                if (lane == 0) {
                    mbarrier_arrive_expect(there, kStageBytes);
                    load_panels<kTileSlots>(target, maps.bank, there, first);
                }
                if (clears) {
                    barriers.wait(there, copied_phase, Waits::kCopied);
                    copied_phase ^= 1;
                    clear_rows<kTileSlots, kPanels>(target, left, lane);
                    fence_proxy_async();
                    warp_sync();
                    if (lane == 0) mbarrier_arrive(ring.full);
                }
                warp_sync();
                ring.advance();
            }
        }
    }

    template <int kTileRows>
    static PSM_DEVICE void load_panels(uint32_t target, const TensorMap& map, uint32_t barrier,
                                       int row) {
        for (int panel = 0; panel < kPanels; ++panel)
            tma_load(target + panel * kTileRows * kRowBytes, &map, barrier, panel * kPanelColumns,
                     row);
    }

    template <class Turn>
    static PSM_DEVICE void similarities(float (&s)[kTiles][4], Descriptor rows, Descriptor slots,
                                        const Turn& turns) {
        hide(rows), hide(slots);
        hold_accumulators(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {  // 32 bytes of a panel row per step
            const int panel = step / 4, within = step % 4 * 32;
            wgmma<T>(s, rows.at(panel * kRows * kRowBytes + within),
                     slots.at(panel * kTileSlots * kRowBytes + within), step > 0);
        }
        wgmma_commit();
        turns.pass();
        wgmma_wait<0>();
        hold_accumulators(s);
    }

    // out += P . M, not waited for
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], Weights<T, kTiles>& weights,
                                      Descriptor columns) {
        hide(columns);
        hold_accumulators(out);
        hold_operands(weights.p);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < kTiles / 2; ++n)
            wgmma_transposed<T>(out, weights.p[n], columns.at(n * 16 * kRowBytes));
        wgmma_commit();
    }

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void consume(const KernelArgs& args, uint32_t base,
                                   const Barriers<kStages>& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        const uint32_t stride = 8 * kRowBytes, leading = kTileSlots * kRowBytes;
        const uint32_t group_rows = base + (thread_index() / 128 - 1) * kGroupRows * kRowBytes;
        const Descriptor query = keep_uniform(descriptor(group_rows, 16, stride), 1);
        // Where the tile of a stage would lie whose barrier had address 0, see Ring
        const uint32_t units = kStageBytes / kUnit / 8, back = 0 - barriers.start * units;
        const uint32_t first_stage = base + kRowTileBytes;
        const Descriptor slots = keep_uniform(descriptor(first_stage, 16, stride).moved(back), 2);
        const Descriptor columns =
            keep_uniform(descriptor(first_stage, leading, stride).moved(back), 3);
        Ring<kStages> ring(barriers);
        const Turns<kWork == Work::kInTurns> turns;
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int split = item / args.row_blocks;
            const int first_row = item % args.row_blocks * kRows + thread_index() / 32 * 16 - 64;
            const int row[2] = {first_row + lane / 4, first_row + lane / 4 + 8};
            const Walk walk = walk_of(args, kTileSlots, split);
            Rows rows;
            NoiseKey noise;
            uint32_t column = 0;
            start_rows<kSelection>(args, row, rows, noise, column);
            column += uint32_t(walk.start(0) / 4);
            float out[kOut][4] = {};
            Masks<kTileSlots> masks(args, row, walk);
            int gone[2] = {};
            Weights<T, kTiles> weights;
            // `empty` of the stage before, which P . M may still read: left after the next wait for
            // products, which end in order. Before the first tile there is none.
            uint32_t held = barriers.nobody();
            const auto leave = [&] {
                if (lane == 0) mbarrier_arrive(held);
            };

            barriers.wait(barriers.rows_full(), rows_phase, Waits::kRowsFull);
            rows_phase ^= 1;
            if (walk.tiles > 0) turns.take();
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t stage = ring.full * units;
                float s[kTiles][4];
                barriers.wait(ring.full, ring.phase, Waits::kFull);
                similarities(s, query, slots.moved(stage), turns);
                leave();
                if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
                hold_accumulators(out);
                hold_operands(weights.p);
                held = ring.empty();
                epilogue<kSelection, kWork>(s, out, args, rows, noise, column, weights);
                turns.take();
                accumulate(out, weights, columns.moved(stage));
                ring.advance();
                column += kTileSlots / 4;
            }
            if (walk.tiles > 0) turns.pass();
            wgmma_wait<0>();
            hold_accumulators(out);
            leave();
            if (lane == 0) mbarrier_arrive(barriers.rows_empty());
            write_partial<kSelection>(args, rows, gone, out, row, split);
        }
        turns.close();
    }
};

}  // namespace psm::cuda
