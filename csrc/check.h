// A wrong address or size becomes an exception here instead of a crash in a kernel.
#pragma once

#include <string>

#include "args.h"

namespace psm {

struct Limits {  // of a backend's kernels
    int64_t batch, slots, dim, topk;
};

// Throw std::invalid_argument: the field, what it got, what is wanted.
void check(const PassArgs& args, const Limits& most);
void check(const StepArgs& args, const Limits& most);
void check(const EnqueueArgs& args, const Limits& most);

void check_size(const char* name, int64_t size, int64_t least, int64_t most);
[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& want);

}  // namespace psm
