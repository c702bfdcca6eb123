// Products for 16-bit banks on sm_80 and newer, by mma.sync. P . M reads the tile of query . M, in
// shared memory, through ldmatrix.trans. walk_sm80.cuh has what goes on around them.
#pragma once

#include "../common/epilogue.cuh"
#include "../common/tile.cuh"

namespace psm::cuda {

template <class T, int kDim, int kWarps, int kSlots, int kRing>
struct PassSm80 {
    using Element = T;
    static constexpr int kTileSlots = kSlots, kStages = kRing;
    static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8, kSteps = kDim / 16;
    static constexpr int kRowTileBytes = kRows * kDim * 2, kStageBytes = kTileSlots * kDim * 2;
    static constexpr int kRingStart = kRowTileBytes;
    static constexpr int kSharedBytes = kRingStart + kStages * kStageBytes;
    static_assert(kTileSlots % 16 == 0 && 64 % kTileSlots == 0);

    static PSM_DEVICE void load_rows(const KernelArgs& args, char* shared, int64_t first,
                                     int thread, int left = 0) {
        load_tile<kRows, kDim>(shared_address(shared), args.query, first, 0, args.rows(),
                               args.dim(), args.aligned, thread, kThreads, left);
    }
    static PSM_DEVICE void load_bank(const KernelArgs& args, char* stage, int64_t first,
                                     int64_t end, int thread, int left = 0) {
        load_tile<kTileSlots, kDim>(shared_address(stage), args.bank.rows, first, 0, end,
                                    args.dim(), args.aligned, thread, kThreads, left);
    }

    // s += query . M over one bank tile
    static PSM_DEVICE void add_products(float (&s)[kTiles][4], const KernelArgs&, const int (&)[2],
                                        const char* shared, const char* stage, int thread,
                                        int = 0) {
        const uint32_t query = shared_address(shared), bank = shared_address(stage);
        const int warp = thread / 32, lane = thread % 32;
        // A fragments: row l % 16, chunk l / 16; B: slots 0-7, 8-15 by chunks 0, 1
        const int a_start = chunk_offset<kRows>(16 * warp + lane % 16, lane / 16);
        const int b_start = chunk_offset<kTileSlots>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
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
                                      const char* stage, int lane) {
        const uint32_t start =
            shared_address(stage) + chunk_offset<kTileSlots>(lane % 16, lane / 16);
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
};

}  // namespace psm::cuda
