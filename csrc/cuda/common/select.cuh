// Exact selection by one CTA: the k largest of n distinct 64-bit keys, in order.
#pragma once

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
};

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
