// What the drivers (pass.cpp, step.cpp) share. Compiled for the baseline processor.
#pragma once

#include <functional>

#include "cpu.h"
#include "../kernels/task.h"

namespace psm::cpu {

const Kernels& choose(const std::string& isa, Dtype dtype);

// Runs job(worker) on `count` threads, this one included, and returns when all are done. Jobs take
// items from a shared counter, so that it does not matter how many threads the system grants.
void run_threads(size_t count, const std::function<void(size_t)>& job);

}  // namespace psm::cpu
