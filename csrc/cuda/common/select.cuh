// Exact selection by one CTA: the k largest of n distinct 64-bit keys, in order.
#pragma once

#include "reduce.cuh"
#include "pass.cuh"

namespace psm::cuda {

// Largest first by value, then by smaller position; 0 for what cannot be selected: -inf and NaN.
PSM_HD uint64_t select_key(uint32_t value_bits, uint32_t position) {
    const uint32_t magnitude = value_bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u || value_bits == 0xFF800000u) return 0;
    if (magnitude == 0) value_bits = 0;  // -0 and 0 tie
    const uint32_t ordered = value_bits >> 31 ? ~value_bits : value_bits | 0x80000000u;
    return uint64_t(ordered) << 32 | (0xFFFFFFFFu - position);
}
PSM_HD uint32_t key_value_bits(uint64_t key) {
    const uint32_t ordered = uint32_t(key >> 32);
    return ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered;
}
PSM_HD uint32_t key_position(uint64_t key) { return 0xFFFFFFFFu - uint32_t(key); }

struct SelectScratch {
    int histogram[256];
    int digit, left, count;
    uint64_t of_warp[2][kRowThreads / 32];
};

// A radix pass takes some thousand cycles where keys share digits, as maxima do, and two to five
// are needed; one round of select_few() takes about 250.
constexpr int kFew = 24;

// keys[0 .. k) = the k largest, in descending order, 0 where there are fewer: each thread offers
// the best of its own, and whose was taken looks for its next.
template <class KeyAt>
PSM_DEVICE void select_few(int n, int k, KeyAt key_at, uint64_t* keys, SelectScratch& scratch) {
    const int thread = thread_index();
    const auto best_below = [&](uint64_t limit) {
        uint64_t best = 0;
#pragma unroll 8
        for (int i = thread; i < n; i += kRowThreads) {
            const uint64_t key = key_at(i);
            if (key < limit && key > best) best = key;
        }
        return best;
    };
    uint64_t own = best_below(~uint64_t(0));
    for (int round = 0; round < k; ++round) {
        uint64_t top = own;
        for (int mask = 16; mask > 0; mask /= 2) {
            const uint64_t other = shuffle_xor(top, mask);
            if (other > top) top = other;
        }
        uint64_t* of_warp = scratch.of_warp[round % 2];  // the other may still be read
        if (thread % 32 == 0) of_warp[thread / 32] = top;
        block_sync();
        for (int warp = 0; warp < kRowThreads / 32; ++warp)
            if (of_warp[warp] > top) top = of_warp[warp];
        if (thread == 0) keys[round] = top;
        if (own == top && top != 0) own = best_below(top);  // keys are distinct
    }
    block_sync();
}

// The smallest key of the k largest, 1 if fewer than k are above 0. Radix passes of 8 bits.
template <class KeyAt>
PSM_DEVICE uint64_t select_threshold(int n, int k, KeyAt key_at, SelectScratch& scratch) {
    const int thread = thread_index();
    uint64_t prefix = 0;
    int left = k;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = thread; i < 256; i += block_size()) scratch.histogram[i] = 0;
        block_sync();
        for (int i = thread; i < n; i += block_size()) {
            const uint64_t key = key_at(i);
            const bool same = shift == 56 || key >> (shift + 8) == prefix >> (shift + 8);
            if (key != 0 && same) atomic_add(&scratch.histogram[key >> shift & 255], 1);
        }
        block_sync();
        if (thread < 32) {  // lane l looks at digits 8 l .. 8 l + 7; `above` counts larger ones
            int own = 0;
            for (int i = 0; i < 8; ++i) own += scratch.histogram[8 * thread + i];
            int above = own;
            for (int delta = 1; delta < 32; delta *= 2) {
                const int other = shuffle_down(above, delta);
                if (thread + delta < 32) above += other;
            }
            if (thread == 0) scratch.digit = -1;  // fewer than `left` in all
            warp_sync();
            above -= own;
            if (above < left && above + own >= left) {
                int digit = 8 * thread + 7, larger = above;
                while (larger + scratch.histogram[digit] < left)
                    larger += scratch.histogram[digit--];
                scratch.digit = digit;
                scratch.left = left - larger;
            }
        }
        block_sync();
        if (scratch.digit < 0) return 1;
        prefix |= uint64_t(scratch.digit) << shift;
        left = scratch.left;
        const bool whole = scratch.histogram[scratch.digit] == left;  // all of the digit are wanted
        block_sync();
        if (whole) break;
    }
    return prefix;
}

PSM_HD int power_of_two(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

// keys[0 .. k) = the k largest, in descending order if kSort, 0 where there are fewer; room for
// power_of_two(k).
template <bool kSort, class KeyAt>
PSM_DEVICE void select_largest(int n, int k, KeyAt key_at, uint64_t* keys, SelectScratch& scratch) {
    const int thread = thread_index(), room = power_of_two(k);
    const uint64_t threshold = select_threshold(n, k, key_at, scratch);
    for (int i = thread; i < room; i += block_size()) keys[i] = 0;
    if (thread == 0) scratch.count = 0;
    block_sync();
    for (int i = thread; i < n; i += block_size()) {
        const uint64_t key = key_at(i);
        if (key >= threshold) keys[atomic_add(&scratch.count, 1)] = key;
    }
    block_sync();
    for (int size = 2; kSort && size <= room; size *= 2) {  // bitonic; keys are distinct
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (int i = thread; i < room; i += block_size()) {
                const int other = i ^ stride;
                if (other <= i) continue;
                const uint64_t x = keys[i], y = keys[other];
                if ((x < y) == ((i & size) == 0)) keys[i] = y, keys[other] = x;
            }
            block_sync();
        }
    }
}

}  // namespace psm::cuda
