// The CUDA backend for bindings.cpp: device addresses, sizes and a stream in, exceptions out.
#pragma once

#include <cmath>
#include <functional>
#include <string>

#include "../bank_pass.h"

namespace psm::cuda {

constexpr int kMaxDim = 256;  // of a pass: its (16, D) accumulators per warp must fit registers
constexpr int kMaxTopkDim = 512;  // of bank_topk, which has none

struct Request {
    BankPassArgs pass;         // count, seed and offset are on the device instead:
    const int64_t* count;      // ()
    const int64_t* rng_state;  // (2,) or null
    int64_t slots;             // K
    bool sums;                 // false: bank_topk, with `key` alone
    bool null_epilogue;        // products without epilogue, for benchmarks; outputs mean nothing
    bool force_sm80;           // for benchmarks and tests on a Hopper GPU
    int cell_log2;             // for benchmarks and tests: at least so large, see PassArgs
    int device;
    void* stream;
};

struct EnqueueRequest {
    const void* keys;       // (B, D) in `key_dtype`
    const int64_t *labels, *ids;  // (B,) or null
    void* bank;             // (K, D) in `bank_dtype`
    int64_t *bank_labels, *bank_ids;  // (K,)
    int64_t *ptr, *count;   // ()
    int32_t* ticket;        // () 0 between calls
    int64_t batch, slots, dim;
    Dtype key_dtype, bank_dtype;
    int device;
    void* stream;
};

// The argument of the finish kernel; addresses are the device's.
constexpr int kMaxFinishTopk = 64;

struct FinishArgs {
    const float *query, *key;  // (B, D) unit rows
    const void* bank;          // (K, D)
    const float* s_pos;        // (B,)
    const float *neg_lse, *neg_mean, *neg_sq_lse, *neg_count;  // of a pass without what it mined
    const int64_t* topk_index;                                 // (B, k)
    int batch, dim, topk;
    SoftWeights soft_weights;
    float temperature, weight_temperature, hard_weight;
    float* loss;        // (B,)
    float* grad_query;  // (B, D) of the sum of the losses
    float* stats;       // (3, B) of the negatives: their count, mean and variance of g
};

using Allocate = std::function<void*(size_t)>;  // device memory that outlives the work of the call

void bank_pass(const Request& request, const Allocate& allocate);
void enqueue(const EnqueueRequest& request);
void finish(const FinishArgs& args, Dtype dtype, int device, void* stream);

// Empty, or why this device cannot run the kernels of this build.
std::string unavailable(int device);

// p = 2^-(sharpness (s - s_pos - b))^2 needs one FFMA for the difference when s_pos + b is scaled
// beforehand. Its rounding matters only to a very sharp p, whose scale is made a power of two, so
// that s = s_pos + b gives exactly 0. Never 0: 0 * -inf of a missing slot would be NaN.
inline float sharpness_of(double a) {
    const double exact = std::sqrt(a * 1.4426950408889634);
    const double rounded = exact > 1048576.0 ? std::exp2(std::round(std::log2(exact))) : exact;
    return float(std::fmax(rounded, 1e-30));
}

}  // namespace psm::cuda
