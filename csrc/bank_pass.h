// The two operators in C++: plain pointers and sizes, no torch. All arrays are contiguous.
#pragma once

#include <stddef.h>

#include <cstdint>

namespace psm {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Selection : int { kBernoulli = 0, kExpected = 1, kAll = 2, kAffine = 3 };
enum class SoftWeights : int { kAttention = 0, kUniform = 1, kBinary = 2 };

constexpr int64_t kMaxDim = 4096;
constexpr int64_t kMaxCount = 0xFFFFFFFFll;  // a slot is 32 bits in the mining heaps

// Slots that a row must not see: neither mined, nor summed, nor counted. See psm_kernels/ops.
struct Exclude {
    const int64_t* slots;  // (B, listed) in any order; what lies outside the bank names nothing
    int64_t listed;
    const int64_t *ids, *bank_ids;  // (B,), (K,), or both null: equal ones, and kEmpty, are hidden
};
constexpr int64_t kEmpty = -2;  // in `bank_ids`: the slot holds nothing

struct BankPassArgs {
    const void* query;   // (B, D) in `dtype`
    const void* key;     // (B, D) in `dtype`, null when topk = 0
    const void* bank;    // (K, D) in `dtype`
    const float* s_pos;  // (B,)
    int64_t batch, count, dim;  // B, valid slots <= K, D
    Dtype dtype;
    Selection selection;
    float temperature, a, b;
    int64_t topk;
    uint64_t seed, offset;           // of the canonical noise
    int64_t row_offset, col_offset;  // global index of query row 0 and bank slot 0
    // Of kAffine alone: w = max(alpha + beta s + gamma min(e, cap) + rho, 0), e = exp((s - top)/tau).
    const float* affine;  // (5, B): alpha, beta, gamma, top, cap
    const float* rho;     // (K,)
    Exclude exclude;
    bool exclude_mined;  // what this call mines is not summed either

    float* neg_lse;       // (B,)
    float* neg_mean;      // (B, D), or null: not wanted, which saves the second product
    float* neg_sq_lse;    // (B,)
    float* neg_count;     // (B,)  kAffine: the sum of w
    float* topk_sim;      // (B, topk)
    int64_t* topk_index;  // (B, topk)
};

// bank_topk is the mining half of the pass: `query` in the place of `key`.
struct BankTopkArgs {
    const void* query;  // (B, D) in `dtype`
    const void* bank;   // (K, D) in `dtype`
    int64_t batch, count, dim;
    Dtype dtype;
    int64_t topk;
    Exclude exclude;
    float* topk_sim;      // (B, topk)
    int64_t* topk_index;  // (B, topk)
};

}  // namespace psm
