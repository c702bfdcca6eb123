// How one producing warp and two consuming warpgroups of sm_90a hand stages of shared memory to and
// fro.
#pragma once

#include "primitives_sm90.cuh"
#include "../common/tile.cuh"

namespace psm::cuda {

// 65,536 registers: 128 threads x 24 + 256 x 240
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <int kStages>
struct Barriers {
    static constexpr int kBytes = (2 * kStages + 3) * 8;
    uint32_t start;  // `full` of each stage, then `empty` of each
    PSM_DEVICE uint32_t rows_full() const { return start + 16 * kStages; }
    PSM_DEVICE uint32_t rows_empty() const { return start + 16 * kStages + 8; }
    PSM_DEVICE uint32_t nobody() const { return start + 16 * kStages + 16; }
    PSM_DEVICE void init(int consumer_warps) const {
        if (thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(start + 8 * stage, 1);
                mbarrier_init(start + 8 * (kStages + stage), consumer_warps);
            }
            mbarrier_init(rows_full(), 1);
            mbarrier_init(rows_empty(), consumer_warps);
            mbarrier_init(nobody(), consumer_warps);
            fence_proxy_async();
        }
        block_sync();
    }
};

// A place in a ring of stages and the parity of its phase. The address of the stage's `full`
// barrier tells it.
template <int kStages>
struct Ring {
    uint32_t full, last, phase = 0;
    PSM_DEVICE explicit Ring(const Barriers<kStages>& barriers)
        : full(barriers.start), last(keep_uniform(full + 8 * (kStages - 1))) {}
    PSM_DEVICE uint32_t empty() const { return full + 8 * kStages; }
    PSM_DEVICE void advance() {
        const uint32_t wraps = full == last;
        full += 8 - 8 * kStages * wraps;
        phase ^= wraps;
    }
};

}  // namespace psm::cuda
