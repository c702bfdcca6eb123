// The canonical noise of philox.h with the work of its first three rounds shared: part of it
// depends on the row alone, part on the column alone.
#pragma once

#include "pass.cuh"

namespace psm::cuda {

struct NoiseKey {
    uint32_t offset_low;
    uint32_t low[kPhiloxRounds], high[kPhiloxRounds];  // round keys
    uint32_t round0, round1;  // what all columns add in the first two rounds
};
struct NoiseRow {  // of the state before round 2, without round keys
    uint32_t c2, c3;
};
struct NoiseColumn {
    uint32_t c2, c0, c1, c3;
};

PSM_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
// Warp-uniform, so that the compiler keeps it all in uniform registers.
PSM_DEVICE NoiseKey noise_key(uint64_t seed, uint64_t offset) {
    const uint32_t offset_high = warp_uniform(uint32_t(offset >> 32));
    NoiseKey key;
    key.offset_low = warp_uniform(uint32_t(offset));
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
        key.low[round] = warp_uniform(uint32_t(seed)) + uint32_t(round) * kPhiloxW0;
        key.high[round] = warp_uniform(uint32_t(seed >> 32)) + uint32_t(round) * kPhiloxW1;
    }
    key.round0 = keep_uniform(offset_high ^ key.high[0]);
    key.round1 = keep_uniform(kPhiloxM1 * key.offset_low ^ key.low[1]);
    return key;
}

PSM_DEVICE NoiseRow noise_row(const NoiseKey& key, uint32_t row) {
    const uint32_t c0 = high_product(kPhiloxM1, key.offset_low) ^ row ^ key.low[0];
    return {high_product(kPhiloxM0, c0) ^ key.high[1], kPhiloxM0 * c0};
}

PSM_DEVICE NoiseColumn noise_column(const NoiseKey& key, uint32_t column) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * column;
    const uint64_t p1 = uint64_t(kPhiloxM1) * (uint32_t(p0 >> 32) ^ key.round0);
    const uint64_t q0 = uint64_t(kPhiloxM0) * (uint32_t(p1 >> 32) ^ key.round1);
    return {uint32_t(p0), uint32_t(p1), uint32_t(q0 >> 32), uint32_t(q0)};
}

PSM_DEVICE Philox4 noise_words(const NoiseKey& key, NoiseRow row, NoiseColumn column) {
    const uint64_t p1 = uint64_t(kPhiloxM1) * (row.c2 ^ column.c2);  // round 2
    uint32_t c0 = uint32_t(p1 >> 32) ^ column.c0 ^ key.low[2], c1 = uint32_t(p1);
    uint32_t c2 = column.c1 ^ row.c3 ^ key.high[2], c3 = column.c3;
#pragma unroll
    for (int round = 3; round < kPhiloxRounds; ++round) {
        const uint64_t q0 = uint64_t(kPhiloxM0) * c0, q1 = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(q1 >> 32) ^ c1 ^ key.low[round];
        c1 = uint32_t(q1);
        c2 = uint32_t(q0 >> 32) ^ c3 ^ key.high[round];
        c3 = uint32_t(q0);
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace psm::cuda
