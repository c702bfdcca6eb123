// The CUDA backend for bindings.cpp: device addresses, sizes and a stream in, exceptions out.
#pragma once

#include <functional>
#include <string>

#include "../bank_pass.h"

namespace psm::cuda {

struct Request {
    BankPassArgs pass;         // count, seed and offset are on the device instead:
    const int64_t* count;      // ()
    const int64_t* rng_state;  // (2,) or null
    int64_t slots;             // K
    bool sums;                 // false: bank_topk, with `key` alone
    bool null_epilogue;        // products without epilogue, for benchmarks; outputs mean nothing
    bool force_sm80;           // for benchmarks and tests on a Hopper GPU
    int device;
    void* stream;
};

struct EnqueueRequest {
    const void* keys;       // (B, D) in `key_dtype`
    const int64_t* labels;  // (B,) or null
    void* bank;             // (K, D) in `bank_dtype`
    int64_t* bank_labels;   // (K,)
    int64_t *ptr, *count;   // ()
    int32_t* ticket;        // () 0 between calls
    int64_t batch, slots, dim;
    Dtype key_dtype, bank_dtype;
    int device;
    void* stream;
};

using Allocate = std::function<void*(size_t)>;  // device memory that outlives the work of the call

void bank_pass(const Request& request, const Allocate& allocate);
void enqueue(const EnqueueRequest& request);

// Empty, or why this device cannot run the kernels of this build.
std::string unavailable(int device);

}  // namespace psm::cuda
