// The bank pass for sm_90a: one warp feeds a ring of bank tiles by TMA, two warpgroups of 64 rows
// each take query . M and P . M from the same tile with wgmma. While one does its
// epilogue, the other keeps the tensor cores busy.
#pragma once

#include "../common/epilogue.cuh"
#include "pipeline_sm90.cuh"

namespace psm::cuda {

template <class T, int kDim, int kSlots, int kStages>
struct PassSm90 {
    static constexpr int kTileSlots = kSlots;
    static constexpr int kThreads = 384, kRows = 128, kGroupRows = 64, kConsumerWarps = 8;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8, kSteps = kDim / 16;
    static constexpr int kPanels = kDim / kPanelColumns;
    static constexpr int kRowTileBytes = kRows * kDim * 2, kStageBytes = kTileSlots * kDim * 2;
    static constexpr int kBarriers = kRowTileBytes + kStages * kStageBytes;
    static constexpr int kSharedBytes = kBarriers + Barriers<kStages>::kBytes;
    static_assert(kTileSlots % 64 == 0 && kDim % kPanelColumns == 0);

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void run(const KernelArgs& args, const TensorMaps& maps, char* shared) {
        const uint32_t base = shared_address(shared);
        const Barriers<kStages> barriers = {base + kBarriers};
        barriers.init(kConsumerWarps);
        if (thread_index() < 128) {
            give_registers<kProducerRegisters>();
            if (thread_index() < 32) produce(args, maps, base, barriers);
        } else {
            take_registers<kConsumerRegisters>();
            consume<kSelection, kWork>(args, base, barriers);
        }
    }

    static PSM_DEVICE void produce(const KernelArgs& args, const TensorMaps& maps, uint32_t base,
                                   const Barriers<kStages>& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        Ring<kStages> ring(barriers);
        const uint32_t first_stage = base + kRowTileBytes - barriers.start * (kStageBytes / 8);
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int first_row = item % args.row_blocks * kRows;
            const Walk walk = walk_of(args, kTileSlots, item / args.row_blocks);
            mbarrier_wait(barriers.rows_empty(), rows_phase ^ 1);
            rows_phase ^= 1;
            if (lane == 0) {
                mbarrier_arrive_expect(barriers.rows_full(), kRowTileBytes);
                load_panels<kRows>(base, maps.query, barriers.rows_full(), first_row);
            }
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t target = first_stage + ring.full * (kStageBytes / 8);
                const int first = walk.start(tile) - walk.lead;
                mbarrier_wait(ring.empty(), ring.phase ^ 1);
                if (walk.whole(tile)) {
                    if (lane == 0) {
                        mbarrier_arrive_expect(ring.full, kStageBytes);
                        load_panels<kTileSlots>(target, maps.bank, ring.full, first);
                    }
                } else {  // what lies behind the last valid slot may be NaN: written as zero
                    load_tile<kTileSlots, kDim, false>(target, args.bank.rows, first, 0,
                                                       walk.end - walk.lead, args.dim(), true, lane,
                                                       32);
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

    static PSM_DEVICE void similarities(float (&s)[kTiles][4], Descriptor rows, Descriptor slots) {
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
        wgmma_wait<0>();
        hold_accumulators(s);
    }

    // out += P . M, not waited for
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], const Weights<T, kTiles>& weights,
                                      Descriptor columns) {
        hide(columns);
        hold_accumulators(out);
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
        // The bank tile of the stage whose barrier has address 0
        const uint32_t units = kStageBytes / kUnit / 8, back = 0 - barriers.start * units;
        const uint32_t first_stage = base + kRowTileBytes;
        const Descriptor slots = keep_uniform(descriptor(first_stage, 16, stride).moved(back), 2);
        const Descriptor columns =
            keep_uniform(descriptor(first_stage, leading, stride).moved(back), 3);
        Ring<kStages> ring(barriers);
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
            uint32_t held = barriers.nobody();  // of the stage that P . M may still read
            const auto release = [&] {          // after a wait for products: they end in order
                if (lane == 0) mbarrier_arrive(held);
            };

            mbarrier_wait(barriers.rows_full(), rows_phase);
            rows_phase ^= 1;
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t stage = ring.full * units;
                float s[kTiles][4];
                mbarrier_wait(ring.full, ring.phase);
                similarities(s, query, slots.moved(stage));
                release();
                if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
                hold_accumulators(out);
                held = ring.empty();
                epilogue<kSelection, kWork>(s, out, args, rows, noise, column, weights);
                accumulate(out, weights, columns.moved(stage));
                ring.advance();
                column += kTileSlots / 4;
            }
            wgmma_wait<0>();
            hold_accumulators(out);
            release();
            if (lane == 0) mbarrier_arrive(barriers.rows_empty());
            write_partial<kSelection>(args, rows, gone, out, row, split);
        }
    }
};

}  // namespace psm::cuda
