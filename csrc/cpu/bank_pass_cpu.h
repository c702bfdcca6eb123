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

// Instruction sets that this build has and this machine runs, best first.
std::vector<std::string> instruction_sets();

}  // namespace cpu
}  // namespace psm
