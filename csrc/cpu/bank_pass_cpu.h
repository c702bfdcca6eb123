// The CPU backend as bindings.cpp calls it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../bank_pass.h"

namespace psm {

namespace cpu {

// Bytes of workspace that the call needs; `threads` >= 1 bounds the threads it uses.
size_t workspace_bytes(const BankPassArgs& args, const std::string& isa, int threads);
size_t workspace_bytes(const BankTopkArgs& args, const std::string& isa, int threads);
void run(const BankPassArgs& args, const std::string& isa, int threads, void* workspace);
void run(const BankTopkArgs& args, const std::string& isa, int threads, void* workspace);

// PSM's finish: what a loss makes of a pass, per row.
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
void finish(const FinishArgs& args, const std::string& isa, int threads);

// Unit rows of queries and keys, and the similarity of each pair.
struct UnitPair {
    const float *query, *key;     // (B, D) of any length
    float *unit_query, *unit_key; // (B, D)
    float* norms;                 // (B,) of the queries, 1 for a row of zeros
    float* s_pos;                 // (B,)
    int64_t batch, dim;
};
void unit_pair(const UnitPair& pair);
// gradient (B, D) by unit rows, in place: by the rows that they were made of.
void through_norm(const float* unit, const float* norms, int64_t batch, int64_t dim,
                  float* gradient);

// Instruction sets that this build has and this machine runs, best first.
std::vector<std::string> instruction_sets();

}  // namespace cpu
}  // namespace psm
