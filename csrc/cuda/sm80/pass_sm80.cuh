// The bank pass for sm_80 and newer: cp.async ring of bank tiles, mma.sync. A CTA owns 16 rows per
// warp and walks the bank tiles of its split; P . M reads the tile of query . M through
// ldmatrix.trans.
#pragma once

#include "../common/cells.cuh"
#include "../common/epilogue.cuh"
#include "../common/tile.cuh"

namespace psm::cuda {

template <class T, int kDim, int kWarps, int kSlots, int kStages>
struct PassSm80 {
    static constexpr int kTileSlots = kSlots;
    static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8, kSteps = kDim / 16;
    static constexpr int kRowTileBytes = kRows * kDim * 2, kStageBytes = kTileSlots * kDim * 2;
    static constexpr int kSharedBytes = kRowTileBytes + kStages * kStageBytes;
    static_assert(kTileSlots % 16 == 0 && 64 % kTileSlots == 0);

    // s = query . M over one bank tile
    static PSM_DEVICE void similarities(float (&s)[kTiles][4], uint32_t query, uint32_t bank,
                                        int warp, int lane) {
        // A fragments: row l % 16, chunk l / 16; B: slots 0-7, 8-15 by chunks 0, 1
        const int a_start = chunk_offset<kRows>(16 * warp + lane % 16, lane / 16);
        const int b_start = chunk_offset<kTileSlots>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t a[4], b[4];
            load_matrices(a, step_chunks<kRows>(query + a_start, 2 * step));
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                load_matrices(b, step_chunks<kTileSlots>(bank + b_start, 2 * step) +
                                     8 * n * kRowBytes);
                mma<T>(s[n], a, b[0], b[1]);
                mma<T>(s[n + 1], a, b[2], b[3]);
            }
        }
    }

    // out += P . M
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], const Weights<T, kTiles>& weights,
                                      uint32_t bank, int lane) {
        const uint32_t start = bank + chunk_offset<kTileSlots>(lane % 16, lane / 16);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t b[4];
#pragma unroll
            for (int chunk = 0; chunk < kOut; chunk += 2) {
                load_matrices_transposed(
                    b, step_chunks<kTileSlots>(start, chunk) + 8 * n * kRowBytes);
                mma<T>(out[chunk], weights.p[n / 2], b[0], b[1]);
                mma<T>(out[chunk + 1], weights.p[n / 2], b[2], b[3]);
            }
        }
    }

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void run(const KernelArgs& args, char* shared) {
        const int items = args.row_blocks * args.splits;
        for (int item = block_index(); item < items; item += grid_size()) {
            pass<kSelection, kWork>(args, shared, item % args.row_blocks,
                                    item / args.row_blocks);
            block_sync();  // the next item overwrites shared memory
        }
    }

    template <Selection kSelection, Work kWork>
    static PSM_DEVICE void pass(const KernelArgs& args, char* shared, int block, int split) {
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
        const uint32_t query = shared_address(shared), ring = query + kRowTileBytes;
        const int row[2] = {block * kRows + 16 * warp + lane / 4,
                            block * kRows + 16 * warp + lane / 4 + 8};

        const Walk walk = walk_of(args, kTileSlots, split);
        const auto load_stage = [&](int tile) {
            if (tile < walk.tiles) {
                load_tile<kTileSlots, kDim>(ring + tile % kStages * kStageBytes,
                                            args.bank.rows, walk.start(tile) - walk.lead, 0,
                                            walk.end - walk.lead, args.dim(), args.aligned, thread,
                                            kThreads);
            }
            copy_commit();
        };
        load_tile<kRows, kDim>(query, args.query, int64_t(block) * kRows, 0, args.batch, args.dim(),
                               args.aligned, thread, kThreads);
        for (int stage = 0; stage < kStages - 1; ++stage) load_stage(stage);

        Rows rows;
        NoiseKey noise;
        uint32_t column = 0;
        if constexpr (kWork != Work::kMine) start_rows<kSelection>(args, row, rows, noise, column);
        float out[kOut][4] = {};
        Masks<kTileSlots> masks(args, row, walk);
        int gone[2] = {};
        CellMax best(args, row, walk);
        for (int tile = 0; tile < walk.tiles; ++tile) {
            copy_wait<kStages - 2>();
            block_sync();  // the tile is there for all, and all are done with the one before
            load_stage(tile + kStages - 1);
            const uint32_t bank = ring + tile % kStages * kStageBytes;
            float s[kTiles][4];
            similarities(s, query, bank, warp, lane);
            if (tile == masks.next) masks.apply(s, args, row, walk, tile, gone);
            if constexpr (kWork == Work::kMine) {
                best.take(s);
            } else {
                Weights<T, kTiles> weights;
                epilogue<kSelection, kWork>(s, out, args, rows, noise,
                                            column + uint32_t(walk.start(tile) / 4), weights);
                accumulate(out, weights, bank, lane);
            }
        }
        copy_wait<0>();
        if constexpr (kWork == Work::kMine)
            best.finish();
        else
            write_partial<kSelection>(args, rows, gone, out, row, split);
    }
};

}  // namespace psm::cuda
