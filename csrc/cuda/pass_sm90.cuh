// The bank pass for sm_90a: one warp feeds a ring of bank tiles by TMA, two warpgroups of 64 rows
// each take key . M, query . M and P . M from the same tile with wgmma. While one does its
// epilogue, the other keeps the tensor cores busy.
#pragma once

#include "epilogue.cuh"
#include "primitives_sm90.cuh"
#include "tile.cuh"

namespace psm::cuda {

// A place in a ring of stages and the parity of its current phase.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    PSM_DEVICE void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

template <class T, int kDim, int kSlots, int kStages>
struct PassSm90 {
    static constexpr int kTileSlots = kSlots;
    static constexpr int kThreads = 384, kRows = 128, kGroupRows = 64, kConsumerWarps = 8;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8, kSteps = kDim / 16;
    static constexpr int kPanels = kDim / kPanelColumns;
    static constexpr int kRowTileBytes = kRows * kDim * 2, kStageBytes = kTileSlots * kDim * 2;
    static constexpr int kRingStart = 2 * kRowTileBytes;
    static constexpr int kBarriers = kRingStart + kStages * kStageBytes;
    static constexpr int shared_bytes(Work) { return kBarriers + (2 * kStages + 2) * 8; }
    // 65,536 registers: 128 threads x 24 + 256 x 240
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static_assert(kTileSlots % 64 == 0 && kDim % kPanelColumns == 0);

    struct Barriers {
        uint32_t start;
        PSM_DEVICE uint32_t full(int stage) const { return start + 8 * stage; }
        PSM_DEVICE uint32_t empty(int stage) const { return start + 8 * (kStages + stage); }
        PSM_DEVICE uint32_t rows_full() const { return start + 16 * kStages; }
        PSM_DEVICE uint32_t rows_empty() const { return start + 16 * kStages + 8; }
    };

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void run(const PassArgs& args, const TensorMaps& maps, char* shared) {
        const uint32_t base = shared_address(shared);
        const Barriers barriers = {base + kBarriers};
        if (thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(barriers.full(stage), 1);
                mbarrier_init(barriers.empty(stage), kConsumerWarps);
            }
            mbarrier_init(barriers.rows_full(), 1);
            mbarrier_init(barriers.rows_empty(), kConsumerWarps);
            fence_proxy_async();
        }
        block_sync();
        if (thread_index() < 128) {
            give_registers<kProducerRegisters>();
            if (thread_index() < 32) produce(args, maps, base, barriers);
        } else {
            take_registers<kConsumerRegisters>();
            consume<kSelection, kWork>(args, base, barriers);
        }
    }

    static PSM_DEVICE void produce(const PassArgs& args, const TensorMaps& maps, uint32_t base,
                                   const Barriers& barriers) {
        const int lane = thread_index() % 32, items = args.row_blocks * args.splits;
        Ring<kStages> ring;
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int first_row = item % args.row_blocks * kRows;
            const Walk walk = walk_of(args, kTileSlots, item / args.row_blocks);
            mbarrier_wait(barriers.rows_empty(), rows_phase ^ 1);
            rows_phase ^= 1;
            if (lane == 0) {
                mbarrier_arrive_expect(barriers.rows_full(), (args.mine ? 2 : 1) * kRowTileBytes);
                load_panels<kRows>(base, maps.query, barriers.rows_full(), first_row);
                if (args.mine)
                    load_panels<kRows>(base + kRowTileBytes, maps.key, barriers.rows_full(),
                                       first_row);
            }
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t target = base + kRingStart + ring.stage * kStageBytes;
                const uint32_t full = barriers.full(ring.stage);
                const int first = walk.start(tile) - walk.lead;
                mbarrier_wait(barriers.empty(ring.stage), ring.phase ^ 1);
                if (walk.whole(tile)) {
                    if (lane == 0) {
                        mbarrier_arrive_expect(full, kStageBytes);
                        load_panels<kTileSlots>(target, maps.bank, full, first);
                    }
                } else {  // what lies behind the last valid slot may be NaN: written as zero
                    load_tile<kTileSlots, kDim, false>(target, args.bank, first, 0,
                                                       walk.end - walk.lead, args.dim, true, lane,
                                                       32);
                    fence_proxy_async();
                    warp_sync();
                    if (lane == 0) mbarrier_arrive(full);
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

    // s = rows . M
    static PSM_DEVICE void similarities(float (&s)[kTiles][4], uint32_t rows, uint32_t bank) {
        const Descriptor a(rows, 16, 8 * kRowBytes), b(bank, 16, 8 * kRowBytes);
        hold_accumulators(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {  // 32 bytes of a panel row per step
            const int panel = step / 4, within = step % 4 * 32;
            wgmma<T>(s, a.at(panel * kRows * kRowBytes + within),
                     b.at(panel * kTileSlots * kRowBytes + within), step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        hold_accumulators(s);
    }

    // out += P . M, not waited for
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], const Weights<T, kTiles>& weights,
                                      uint32_t bank) {
        const Descriptor b(bank, kTileSlots * kRowBytes, 8 * kRowBytes);
        hold_accumulators(out);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < kTiles / 2; ++n)
            wgmma_transposed<T>(out, weights.p[n], b.at(n * 16 * kRowBytes));
        wgmma_commit();
    }

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void consume(const PassArgs& args, uint32_t base, const Barriers& barriers) {
        const int group = warp_uniform(thread_index() / 128) - 1, lane = thread_index() % 32;
        const int items = args.row_blocks * args.splits;
        const uint32_t query = base + group * kGroupRows * kRowBytes, key = query + kRowTileBytes;
        Ring<kStages> ring;
        uint32_t rows_phase = 0;
        for (int item = block_index(); item < items; item += grid_size()) {
            const int split = item / args.row_blocks;
            const int first_row = item % args.row_blocks * kRows + thread_index() / 32 * 16 - 64;
            const int row[2] = {first_row + lane / 4, first_row + lane / 4 + 8};
            const Walk walk = walk_of(args, kTileSlots, split);
            const int cell_mask = (1 << args.cell_log2) - 1;
            Rows rows;
            NoiseKey noise;
            uint32_t column = 0;
            start_rows<kSelection>(args, row, rows, noise, column);
            float out[kOut][4] = {};
            Weights<T, kTiles> weights;
            CellMax best(args, row, walk);
            int held = -1;  // stage that P . M of the tile before may still read
            const auto release = [&] {  // after any wait for products: they end in order
                if (held >= 0 && lane == 0) mbarrier_arrive(barriers.empty(held));
                held = -1;
            };

            mbarrier_wait(barriers.rows_full(), rows_phase);
            rows_phase ^= 1;
            for (int tile = 0; tile < walk.tiles; ++tile) {
                const uint32_t bank = base + kRingStart + ring.stage * kStageBytes;
                float s[kTiles][4];
                mbarrier_wait(barriers.full(ring.stage), ring.phase);
                if (args.mine) {
                    similarities(s, key, bank);
                    release();
                    mask_slots(s, walk, tile);
                    best.take(s, walk.start(tile), walk.left(tile), cell_mask);
                }
                similarities(s, query, bank);
                release();
                hold_accumulators(out);
                held = ring.stage;
                mask_slots(s, walk, tile);
                epilogue<kSelection, kWork>(s, out, args, rows, noise,
                                            column + uint32_t(walk.start(tile) / 4), weights);
                accumulate(out, weights, bank);
                ring.advance();
            }
            wgmma_wait<0>();
            hold_accumulators(out);
            release();
            if (lane == 0) mbarrier_arrive(barriers.rows_empty());
            write_partial<kSelection>(args, rows, out, row, split);
        }
    }
};

}  // namespace psm::cuda
