// Canonical noise: one 32-bit word per (global row, global slot), the same on every backend.
// What the kernels share of Philox4x32-10 of Random123 (Salmon et al., SC11).
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

// Columns are permuted so that the four words of a counter belong to four accumulator elements
// that one thread of a tensor-core fragment owns: slots j, j + 1, j + 8, j + 9 for even j % 8 have
// the words of counter (4 (j / 16) + (j % 8) / 2, row, offset low, offset high), in this order.
struct Philox4 {
    uint32_t word[4];
};

}  // namespace psm
