// The CUDA backend for bindings.cpp: structs of args.h with device addresses in, exceptions out.
#pragma once

#include <string>

#include "../../args.h"
#include "../common/limits.h"

namespace psm::cuda {

struct Place {
    int device = 0;
    void* stream = nullptr;
    void* workspace = nullptr;  // memory of the device that outlives the work of the call
    // For benchmarks and tests:
    bool null_epilogue = false;  // products alone, whose results mean nothing
    bool force_sm80 = false;     // the kernels of sm_80 on a Hopper GPU
    bool ping_pong = false;      // of kBernoulli on sm_90a: see Turns
    int cell_log2 = 0;           // mining's cells are at least so large, see KernelArgs
};

size_t workspace_bytes(const PassArgs& args, const Place& place);
size_t workspace_bytes(const StepArgs& args, const Place& place);
void bank_pass(const PassArgs& args, const Place& place);
void psm_step(const StepArgs& args, const Place& place);
void enqueue(const EnqueueArgs& args, const Place& place);

// Empty, or why this device cannot run the kernels of this build. It loads them all.
std::string unavailable(int device);

}  // namespace psm::cuda
