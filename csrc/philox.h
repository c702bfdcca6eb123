// Canonical noise: one 32-bit word per (global row, global slot), the same on every backend.
// Philox4x32-10 of Random123 (Salmon et al., SC11), usable from host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PSM_HD __host__ __device__ __forceinline__
#else
#define PSM_HD inline
#endif

namespace psm {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

struct Philox4 {
    uint32_t word[4];
};

PSM_HD Philox4 philox4x32(Philox4 counter, uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c3 = uint32_t(p0);
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// Columns are permuted so that the four words of a counter belong to four accumulator elements
// that one thread of a tensor-core fragment owns: slots j, j + 1, j + 8, j + 9 for even j % 8.
PSM_HD uint32_t philox_column(int64_t slot) {
    return uint32_t(4 * (slot / 16) + (slot % 8) / 2);
}
PSM_HD int philox_lane(int64_t slot) { return int(2 * ((slot % 16) / 8) + slot % 2); }

PSM_HD Philox4 philox_counter(uint32_t column, int64_t row, uint64_t offset) {
    return {{column, uint32_t(row), uint32_t(offset), uint32_t(offset >> 32)}};
}

}  // namespace psm
