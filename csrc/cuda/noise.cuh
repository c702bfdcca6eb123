// The canonical noise of philox.h with the work of its first three rounds shared: part of it depends
// on the row alone, part on the column alone.
#pragma once

#include "pass.cuh"

namespace psm::cuda {

struct NoiseKey {  // round keys as a warp-uniform value each
    uint32_t low, high;
    uint32_t offset_low, offset_high;
};
struct NoiseRow {
    uint32_t c2, c3;  // of the state after round 1
};
struct NoiseColumn {
    uint32_t lo, c1, hi, c3;
};

PSM_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
PSM_DEVICE uint32_t round_key0(const NoiseKey& key, int round) {
    return key.low + uint32_t(round) * kPhiloxW0;
}
PSM_DEVICE uint32_t round_key1(const NoiseKey& key, int round) {
    return key.high + uint32_t(round) * kPhiloxW1;
}

PSM_DEVICE NoiseRow noise_row(const NoiseKey& key, uint32_t row) {
    const uint32_t c0 = high_product(kPhiloxM1, key.offset_low) ^ row ^ round_key0(key, 0);
    return {high_product(kPhiloxM0, c0) ^ round_key1(key, 1), kPhiloxM0 * c0};
}

PSM_DEVICE NoiseColumn noise_column(const NoiseKey& key, uint32_t column) {
    const uint32_t c2 = high_product(kPhiloxM0, column) ^ key.offset_high ^ round_key1(key, 0);
    const uint32_t c3 = kPhiloxM0 * column;
    const uint64_t p1 = uint64_t(kPhiloxM1) * c2;
    const uint32_t c0 = uint32_t(p1 >> 32) ^ (kPhiloxM1 * key.offset_low) ^ round_key0(key, 1);
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
    return {c3, uint32_t(p1) ^ round_key0(key, 2), uint32_t(p0 >> 32) ^ round_key1(key, 2),
            uint32_t(p0)};
}

PSM_DEVICE Philox4 noise_words(const NoiseKey& key, NoiseRow row, NoiseColumn column) {
    const uint64_t p1 = uint64_t(kPhiloxM1) * (row.c2 ^ column.lo);  // round 2
    uint32_t c0 = uint32_t(p1 >> 32) ^ column.c1, c1 = uint32_t(p1);
    uint32_t c2 = column.hi ^ row.c3, c3 = column.c3;
#pragma unroll
    for (int round = 3; round < kPhiloxRounds; ++round) {
        const uint64_t q0 = uint64_t(kPhiloxM0) * c0, q1 = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(q1 >> 32) ^ c1 ^ round_key0(key, round);
        c1 = uint32_t(q1);
        c2 = uint32_t(q0 >> 32) ^ c3 ^ round_key1(key, round);
        c3 = uint32_t(q0);
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace psm::cuda
