// The CPU backend as bindings.cpp calls it, with arguments that are checked.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../../check.h"

namespace psm::cpu {

constexpr int64_t kMaxSlots = 0xFFFFFFFFll;  // a slot is 32 bits in the mining heaps
constexpr Limits kLimits{INT64_MAX, kMaxSlots, 4096, INT64_MAX};

// Instruction sets that this build has and this machine runs, each with those below it: `isa` is one
// of them. processor.h says which is the fastest.
std::vector<std::string> instruction_sets();
std::string products(const std::string& isa);  // what it multiplies, in words

// `threads` >= 1 bounds the threads that are used.
void bank_pass(const PassArgs& args, const std::string& isa, int threads);
void psm_step(const StepArgs& args, const std::string& isa, int threads);
void enqueue(const EnqueueArgs& args, const std::string& isa, int threads);

// Bytes that bank_pass allocates for itself.
size_t workspace_bytes(const PassArgs& args, const std::string& isa, int threads);

}  // namespace psm::cpu
