// Products for 16-bit banks of D above 256, whose sums of one row no warp can hold: four warps share
// 16 rows, each with every fourth panel of 64 columns. Of query . M a warp adds up its own columns,
// which are then added over the four (add_shares), so that each goes on with whole similarities,
// the same bits and the same masks; of P . M it owns its columns. No product is made twice, noise and
// weights are made four times: at D = 768 they issue for half of the time that the products take.
//
// Hopper runs this as well: there is no such kernel with wgmma.
#pragma once

#include "../common/epilogue.cuh"
#include "../common/limits.h"
#include "../common/tile.cuh"

namespace psm::cuda {

struct alignas(8) Pair {
    float x, y;
};

// Adds the similarities of the warps that share 16 rows, always in the same order. `shared` has room
// for kPairs pairs of floats of each thread of the block, which are sent at once.
template <int kShares, int kPairs, int kTiles>
PSM_DEVICE void add_shares(float (&s)[kTiles][4], char* shared, int thread) {
    const int lane = thread % 32, own = thread / 32 % kShares, group = thread / 32 / kShares;
    const int barrier = 1 + group;
    Pair* area = reinterpret_cast<Pair*>(shared) + group * kShares * kPairs * 32;
#pragma unroll
    for (int first = 0; first < 2 * kTiles; first += kPairs) {
        if (first > 0) named_sync(barrier, 32 * kShares);  // the last ones have been read
#pragma unroll
        for (int i = first; i < first + kPairs; ++i)
            area[(own * kPairs + i - first) * 32 + lane] = {s[i / 2][i % 2 * 2],
                                                            s[i / 2][i % 2 * 2 + 1]};
        named_sync(barrier, 32 * kShares);
#pragma unroll
        for (int i = first; i < first + kPairs; ++i) {
            Pair sum = area[(i - first) * 32 + lane];
#pragma unroll
            for (int share = 1; share < kShares; ++share) {
                const Pair other = area[(share * kPairs + i - first) * 32 + lane];
                sum.x += other.x, sum.y += other.y;
            }
            s[i / 2][i % 2 * 2] = sum.x, s[i / 2][i % 2 * 2 + 1] = sum.y;
        }
    }
}

template <class T, int kSlots, int kRing>
struct WideSm80 {
    using Element = T;
    static constexpr int kTileSlots = kSlots, kStages = kRing;
    static constexpr int kWarps = 8, kShares = 4, kPanels = 3;  // of a warp
    static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps / kShares;
    static constexpr int kTiles = kTileSlots / 8, kOut = kPanels * kPanelColumns / 8;
    static constexpr int kPanelBytes = kTileSlots * kRowBytes;
    static constexpr int kRingStart = 0, kStageBytes = kShares * kPanels * kPanelBytes;
    static constexpr int kPairs = 2 * kTiles, kSharesStart = kStages * kStageBytes;
    static constexpr int kSharedBytes = kSharesStart + kThreads * kPairs * int(sizeof(Pair));
    static_assert(kShares * kPanels * kPanelColumns >= kMaxDim);
    static_assert(kTileSlots % 16 == 0 && 64 % kTileSlots == 0);

    static PSM_DEVICE int panels_of(const KernelArgs& args) {
        return (args.dim() + kPanelColumns - 1) / kPanelColumns;
    }
    static PSM_DEVICE int share_of(int thread) { return thread / 32 % kShares; }

    // A fragments of the warp's rows and columns: registers spare a third of the reads of shared
    // memory, and 48 KB of it.
    struct Query {
        uint32_t a[kPanels * 4][4];
    };
    static PSM_DEVICE Query load_rows(const KernelArgs& args, char*, int64_t, const int (&row)[2],
                                      int thread) {
        const int dim = args.dim(), share = share_of(thread);
        const uint16_t* from[2];
        for (int r = 0; r < 2; ++r) {
            const int64_t inside = row[r] < args.rows() ? row[r] : args.rows() - 1;
            from[r] = static_cast<const uint16_t*>(args.query) + inside * dim;
        }
        const auto element = [&](int r, int column) {
            return uint32_t(column < dim ? from[r][column] : 0);
        };
        Query query;
#pragma unroll
        for (int step = 0; step < kPanels * 4; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = (step / 4 * kShares + share) * kPanelColumns + step % 4 * 16 +
                                   i / 2 * 8 + thread % 4 * 2;
                query.a[step][i] = element(i % 2, column) | element(i % 2, column + 1) << 16;
            }
        return query;
    }

    static PSM_DEVICE void load_bank(const KernelArgs& args, char* stage, int64_t first,
                                     int64_t end, int thread) {
        const int chunks = panels_of(args) * kTileSlots * 8;
        for (int at = thread; at < chunks; at += kThreads) {
            const int panel = at / (kTileSlots * 8), row = at / 8 % kTileSlots;
            load_chunk<kTileSlots>(shared_address(stage), args.bank.rows, first, 0, end,
                                   args.dim(), args.aligned, row, panel * 8 + at % 8);
        }
    }

    // s += query . M over one bank tile, of the warp's columns
    static PSM_DEVICE void add_products(float (&s)[kTiles][4], const KernelArgs& args,
                                        const int (&)[2], const Query& query, const char* stage,
                                        int thread) {
        const int lane = thread % 32, share = share_of(thread), panels = panels_of(args);
        const uint32_t start = shared_address(stage) + share * kPanelBytes +
                               chunk_offset<kTileSlots>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            if (panel > 0 && panel * kShares + share >= panels) break;
#pragma unroll
            for (int step = 0; step < 4; ++step)
#pragma unroll
                for (int n = 0; n < kTiles; n += 2) {
                    uint32_t b[4];
                    load_matrices(b, step_chunks<kTileSlots>(start, 2 * step) +
                                         panel * kShares * kPanelBytes + 8 * n * kRowBytes);
                    mma<T>(s[n], query.a[4 * panel + step], b[0], b[1]);
                    mma<T>(s[n + 1], query.a[4 * panel + step], b[2], b[3]);
                }
        }
    }

    // out += P . M, of the warp's columns
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], const Weights<T, kTiles>& weights,
                                      const KernelArgs& args, const char* stage, int thread) {
        const int lane = thread % 32, share = share_of(thread), panels = panels_of(args);
        const uint32_t start = shared_address(stage) + share * kPanelBytes +
                               chunk_offset<kTileSlots>(lane % 16, lane / 16);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            if (panel > 0 && panel * kShares + share >= panels) break;
#pragma unroll
            for (int n = 0; n < kTiles; n += 2)
#pragma unroll
                for (int chunk = 0; chunk < 8; chunk += 2) {
                    uint32_t b[4];
                    load_matrices_transposed(
                        b, step_chunks<kTileSlots>(start, chunk) +
                               panel * kShares * kPanelBytes + 8 * n * kRowBytes);
                    mma<T>(out[8 * panel + chunk], weights.p[n / 2], b[0], b[1]);
                    mma<T>(out[8 * panel + chunk + 1], weights.p[n / 2], b[2], b[3]);
                }
        }
    }
};

}  // namespace psm::cuda
