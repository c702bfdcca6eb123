// The CPU backend as bindings.cpp calls it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../../check.h"

namespace psm::cpu {

constexpr int64_t kMaxSlots = 0xFFFFFFFFll;  // a slot is 32 bits in the mining heaps
constexpr Limits kLimits{INT64_MAX, kMaxSlots, 4096, INT64_MAX};

// `threads` >= 1 bounds the threads that are used.
void bank_pass(const PassArgs& args, const std::string& isa, int threads);
// Bytes that the call allocates for itself.
size_t workspace_bytes(const PassArgs& args, const std::string& isa, int threads);

// Instruction sets that this build has and this machine runs, best first.
std::vector<std::string> instruction_sets();

// --- until step.cpp has psm_step ---
struct FinishArgs {
    const float *query, *key;  // (B, D) unit rows
    const void* bank;          // (K, D) in `dtype`
    const float* s_pos;        // (B,)
    // Of a pass that left out what it mined
    const float *neg_lse, *neg_mean, *neg_sq_lse, *neg_count;
    const int64_t* topk_index;  // (B, topk)
    int64_t batch, dim, topk;
    Dtype dtype;
    float temperature;
    SoftWeights soft_weights;
    float weight_temperature, hard_weight;
    float* loss;        // (B,)
    float* grad_query;  // (B, D) of the sum of the losses, by the unit query
    float* stats;       // (3, B) negatives kept; mean and variance of g = d loss / d s over them
};

struct UnitPair {
    const float *query, *key;     // (B, D) of any length
    float *unit_query, *unit_key; // (B, D)
    float* norms;                 // (B,) of the queries, 1 for a row of zeros
    float* s_pos;                 // (B,)
    int64_t batch, dim;
};

}  // namespace psm::cpu
