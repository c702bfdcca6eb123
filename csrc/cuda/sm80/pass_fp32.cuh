// Products for fp32 banks, true fp32 ones on the ordinary units: no TF32. Threads own the elements
// that a tensor-core accumulator would give them, so that walk_sm80.cuh serves both.
#pragma once

#include "../common/epilogue.cuh"

namespace psm::cuda {

template <int kDim, int kWarps, int kSlots, int kRing>
struct PassFp32 {
    using Element = float;
    static constexpr int kStages = kRing, kRingStart = 0;
    static constexpr int kTileSlots = kSlots;
    static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
    static constexpr int kTiles = kTileSlots / 8, kOut = kDim / 8;
    static constexpr int kRowTileBytes = 0;
    static constexpr int kPitch = kDim + 4;  // 16 bytes more: slots 2 c fall into different banks
    static constexpr int kStageBytes = kTileSlots * kPitch * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kTileSlots % 16 == 0 && 64 % kTileSlots == 0);

    struct alignas(16) Four {
        float x[4];
    };

    static PSM_DEVICE Four load_four(const float* row, int column, int dim, bool aligned) {
        if (aligned && column < dim) return *reinterpret_cast<const Four*>(row + column);
        Four four;
        for (int i = 0; i < 4; ++i) four.x[i] = column + i < dim ? row[column + i] : 0.0f;
        return four;
    }

    static PSM_DEVICE void load_rows(const KernelArgs&, char*, int64_t, int, int = 0) {}  // L1

    static PSM_DEVICE void load_bank(const KernelArgs& args, char* stage, int64_t first,
                                     int64_t end, int thread, int left = 0) {
        const uint32_t tile = shared_address(stage);
        constexpr int kRowChunks = kDim / 4;
        const auto* bank = static_cast<const float*>(args.bank.rows);
        for (int at = thread; at < kTileSlots * kRowChunks; at += kThreads) {
            const int row = at / kRowChunks, place = at % kRowChunks * 4, column = left + place;
            const uint32_t target = tile + (row * kPitch + place) * 4;
            const bool inside = first + row >= 0 && first + row < end && column < args.dim();
            const float* from = bank + (inside ? (first + row) * args.dim() : 0);
            if (args.aligned) {
                copy_async(target, inside ? from + column : bank, inside ? 16 : 0);
            } else {
                Chunk chunk = {};
                if (inside) {
                    const Four four = load_four(from, column, args.dim(), false);
                    for (int i = 0; i < 4; ++i) chunk.word[i] = float_bits(four.x[i]);
                }
                store_shared(target, chunk);
            }
        }
    }

    // s += query . M for the thread's two rows, of the columns from `left` on that a stage holds
    static PSM_DEVICE void add_products(float (&s)[kTiles][4], const KernelArgs& args,
                                        const int (&row)[2], const char*, const char* stage,
                                        int thread, int left = 0) {
        const auto* bank = reinterpret_cast<const float*>(stage);
        const float* from[2];
        for (int r = 0; r < 2; ++r) {
            const int64_t inside = row[r] < args.rows() ? row[r] : args.rows() - 1;
            from[r] = static_cast<const float*>(args.query) + inside * args.dim();
        }
        const int width = args.dim() - left < kDim ? args.dim() - left : kDim;
        for (int column = 0; column < width; column += 4) {
            const Four a[2] = {load_four(from[0], left + column, args.dim(), args.aligned),
                               load_four(from[1], left + column, args.dim(), args.aligned)};
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int slot = 8 * n + 2 * (thread % 4) + i;
                    const Four m = *reinterpret_cast<const Four*>(bank + slot * kPitch + column);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        s[n][i] = fmaf(a[0].x[k], m.x[k], s[n][i]);
                        s[n][2 + i] = fmaf(a[1].x[k], m.x[k], s[n][2 + i]);
                    }
                }
        }
    }

    // out += P . M; the weights of a slot come from the thread of the quad that owns it
    static PSM_DEVICE void accumulate(float (&out)[kOut][4], const Weights<float, kTiles>& weights,
                                      const char* stage, int lane) {
        const auto* bank = reinterpret_cast<const float*>(stage);
        const auto& p = weights.p;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll 1
            for (int owner = 0; owner < 4; ++owner)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float p0 = shuffle_from(p[n][i], (lane & ~3) + owner);
                    const float p1 = shuffle_from(p[n][2 + i], (lane & ~3) + owner);
                    const float* m = bank + (8 * n + 2 * owner + i) * kPitch + 2 * (lane % 4);
#pragma unroll
                    for (int d = 0; d < kOut; ++d) {
                        out[d][0] = fmaf(p0, m[8 * d], out[d][0]);
                        out[d][1] = fmaf(p0, m[8 * d + 1], out[d][1]);
                        out[d][2] = fmaf(p1, m[8 * d], out[d][2]);
                        out[d][3] = fmaf(p1, m[8 * d + 1], out[d][3]);
                    }
                }
    }
};

}  // namespace psm::cuda
