// Every plain struct that crosses from Python into the kernels, of the CPU and of CUDA alike. Plain
// pointers and sizes, no torch; all arrays are contiguous and lie where the kernels run. bindings.cpp
// binds them field by field.
#pragma once

#include <stddef.h>

#include <cstdint>

namespace psm {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Selection : int { kBernoulli = 0, kExpected = 1, kAll = 2, kAffine = 3 };
enum class SoftWeights : int { kAttention = 0, kUniform = 1, kBinary = 2 };
enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

constexpr int64_t kEmpty = -2;  // in `bank_ids`: the slot holds nothing

// psm_kernels/options.py says what they mean.
struct PassOptions {
    float temperature = 1, a = 0, b = 0;
    Selection selection = Selection::kAll;
    int64_t topk = 0;
    bool exclude_mined = false;              // what this call mines is not summed either
    int64_t row_offset = 0, col_offset = 0;  // global index of query row 0 and bank slot 0
};

struct Bank {
    const void* rows = nullptr;  // (K, D) in `dtype`
    int64_t slots = 0, dim = 0;  // K, D
    Dtype dtype = Dtype::kFloat32;
    const int64_t* count = nullptr;  // () slots [0, count) are valid; clamped to [0, K]
};

// Slots that a row must not see: neither mined, nor summed, nor counted.
struct Exclude {
    const int64_t* slots = nullptr;  // (B, listed); what lies outside the bank names nothing
    int64_t listed = 0;
    const int64_t *ids = nullptr, *bank_ids = nullptr;  // (B,), (K,), or both null: equal ones, and
                                                        // kEmpty, are hidden
};

// bank_pass; without `query` it is bank_topk, which mines for `key` alone.
struct PassArgs {
    PassOptions options;
    Bank bank;
    Exclude exclude;
    int64_t batch = 0;                 // B
    const void *query = nullptr;       // (B, D) in the bank's dtype
    const void *key = nullptr;         // (B, D) in the bank's dtype, null when topk = 0
    const float* s_pos = nullptr;      // (B,)
    const int64_t* rng_state = nullptr;  // (2,) seed and offset of the noise; for kBernoulli alone
    // Of kAffine alone: w = max(alpha + beta s + gamma min(e, cap) + rho, 0), e = exp((s - top)/tau).
    const float* affine = nullptr;  // (5, B): alpha, beta, gamma, top, cap
    const float* rho = nullptr;     // (K,)

    float* neg_lse = nullptr;       // (B,)
    float* neg_mean = nullptr;      // (B, D), or null: not wanted, which saves the second product
    float* neg_sq_lse = nullptr;    // (B,)
    float* neg_count = nullptr;     // (B,)  kAffine: the sum of w
    float* topk_sim = nullptr;      // (B, topk)
    int64_t* topk_index = nullptr;  // (B, topk)
};

// psm_step: unit rows, the pass, PSM's loss and its gradient through the normalization.
struct StepArgs {
    PassArgs pass;  // its options, bank, exclude, batch and rng_state; the rest is made inside
    const float *query = nullptr, *key = nullptr;  // (B, D) of any length
    SoftWeights soft_weights = SoftWeights::kAttention;
    float weight_temperature = 1, hard_weight = 1;

    Reduction reduction = Reduction::kNone;

    float* loss = nullptr;      // (B,) for kNone, else ()
    float* gradient = nullptr;  // (B, D) of the loss by `query`, of kNone that of the rows' sum
};

// A batch behind the newest rows of a ring: normalized, cast, written; pointer and count advance.
struct EnqueueArgs {
    Bank bank;                     // `rows` and `count` are written
    const void* keys = nullptr;    // (B, D) in `key_dtype`, of any length
    Dtype key_dtype = Dtype::kFloat32;
    int64_t batch = 0;
    const int64_t *labels = nullptr, *ids = nullptr;       // (B,) or null: -1, as are negative ids
    int64_t *bank_labels = nullptr, *bank_ids = nullptr;   // (K,)
    int64_t* ptr = nullptr;        // ()
    int64_t* rng_state = nullptr;  // (2,) whose offset goes on by one besides, or null
};

}  // namespace psm
