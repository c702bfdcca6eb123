// How the warps of an sm_90a block share the work: one produces, eight consume.
//
// Threads. Warp 0 feeds shared memory by TMA, warps 1 to 3 only give their registers away, and two
// warpgroups of 128 threads take 64 rows each of the block's 128.
//
// Registers. A block of 384 threads can launch with 65,536 / 384 = 168 per thread. Then the first
// 128 threads go down to 24 and the other 256 up to 240: 128 x 24 + 256 x 240 = 384 x 168. Of those
// 240 a consumer holds, per thread, for D = 64 / 128 / 256:
//     similarities, (64, tile slots) fp32 of the group    64 / 64 / 32
//     P in 16 bits, while P . M reads it                  32 / 32 / 16
//     P . M, (64, D) fp32                                 32 / 64 / 128
// and the rest is for sums, noise and addresses. What all threads of a warp have in common lies in
// uniform registers. Mining holds (64, 256) similarities, 128 registers, and little else.
//
// The ring. Each stage has a barrier `full`, which the bytes of TMA complete, and one `empty`, at
// which each consuming warp arrives once its products have read the stage. A barrier completes
// phase after phase, and who waits names the parity of the one to wait for.
#pragma once

#include "../common/tile.cuh"
#include "primitives_sm90.cuh"

namespace psm::cuda {

constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kGroupRows = 64, kConsumerWarps = 8;

template <int kStages>
struct Barriers {
    static constexpr int kBytes = (2 * kStages + 4) * 8;
    uint32_t start;  // `full` of each stage, then `empty` of each
    Trapped* trapped;  // see PSM_CUDA_TRAP
    PSM_DEVICE uint32_t rows_full() const { return start + 16 * kStages; }  // the block's rows
    PSM_DEVICE uint32_t rows_empty() const { return start + 16 * kStages + 8; }
    PSM_DEVICE uint32_t nobody() const { return start + 16 * kStages + 16; }  // no one waits for it
    PSM_DEVICE uint32_t copied() const { return start + 16 * kStages + 24; }  // but not yet `full`
    PSM_DEVICE void init() const {
        if (thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(start + 8 * stage, 1);
                mbarrier_init(start + 8 * (kStages + stage), kConsumerWarps);
            }
            mbarrier_init(rows_full(), 1);
            mbarrier_init(rows_empty(), kConsumerWarps);
            mbarrier_init(nobody(), kConsumerWarps);
            mbarrier_init(copied(), 1);
            fence_proxy_async();
        }
        block_sync();
    }

    // In a debug build two seconds are enough: the kernel says who waits for what, and ends. By a
    // store, because around a call such as printf the compiler would take the products one by one.
    // A warp votes, because what follows a loop that its lanes leave one by one is not uniform to
    // the assembler: the kernels in turns had 328 bytes of stack, and products one by one, too.
    PSM_DEVICE void wait(uint32_t barrier, uint32_t parity, Waits what) const {
#ifdef PSM_CUDA_TRAP
        const uint32_t begin = nanoseconds();
        while (warp_any(!mbarrier_done(barrier, parity))) {
            if (nanoseconds() - begin < 2000000000u) continue;
            const uint32_t stage = (barrier - start) / 8 % kStages, warp = thread_index() / 32;
            end_with_error(trapped, {uint32_t(what), stage, uint32_t(block_index()), warp});
        }
#else
        mbarrier_wait(barrier, parity);
#endif
    }
};

// A place in the ring, and the parity of its phase. It is kept as the address of the stage's `full`
// barrier, from which that of its tile follows as well: barriers are 8 bytes apart, tiles
// kStageBytes. A count of stages would cost a register and an instruction more.
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

// The consuming groups start products in turns, in kernels that are made so: else whose epilogue is
// ready first decides, and both may wait for the tensor cores, then both compute (FlashAttention-3,
// arXiv 2407.08608, 3.1). A turn ends when products are started, not when they are done.
template <bool kOn>
struct Turns {
    const int group = int(warp_uniform(thread_index() / 128)) - 1;  // 0, which begins, or 1

    PSM_DEVICE Turns() {
        if (group == 1) pass();
    }
    PSM_DEVICE void take() const {
        if constexpr (kOn) named_sync(1 + group, 2 * 128);
    }
    PSM_DEVICE void pass() const {
        if constexpr (kOn) named_arrive(2 - group, 2 * 128);
    }
    PSM_DEVICE void close() const {  // takes the turn that the other group has passed last
        if (group == 0) take();
    }
};

template <class Pass, class Consume>
PSM_DEVICE void produce_and_consume(const KernelArgs& args, const TensorMaps& maps, char* shared,
                                    Consume consume) {
    const uint32_t base = shared_address(shared);
    const Barriers<Pass::kStages> barriers = {base + Pass::kBarriers, args.trapped};
    barriers.init();
    if (thread_index() < 128) {
        give_registers<kProducerRegisters>();
        if (thread_index() < 32) Pass::produce(args, maps, base, barriers);
    } else {
        take_registers<kConsumerRegisters>();
        consume(base, barriers);
    }
}

}  // namespace psm::cuda
