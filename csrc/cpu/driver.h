// What the drivers (bank_pass.cpp, finish.cpp) share. Compiled for the baseline processor.
#pragma once

#include <functional>

#include "bank_pass_cpu.h"
#include "task.h"

namespace psm::cpu {

const Kernels& choose(const std::string& isa, Dtype dtype);

// Runs job(worker) on `count` threads, this one included, and returns when all are done. Jobs take
// items from a shared counter, so that it does not matter how many threads the system grants.
void run_threads(size_t count, const std::function<void(size_t)>& job);

}  // namespace psm::cpu
