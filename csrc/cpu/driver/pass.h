// A pass over the bank from its arguments to the sums of each row. Compiled, as all of driver/, for
// the baseline processor.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../kernels/task.h"
#include "cpu.h"
#include "workspace.h"

namespace psm::cpu {

const Kernels& choose(const std::string& isa, Dtype dtype);

// `items` calls of run(worker, item) in any order. A phase begins when the one before is done.
struct Phase {
    int64_t items;
    std::function<void(size_t worker, int64_t item)> run;
};

// On `threads` threads, this one included: they are started once, for all the phases.
void run_phases(size_t threads, const std::vector<Phase>& phases);

class Pass {
  public:
    Pass(const PassArgs& args, const std::string& isa, int threads);

    void lay_out(Arena& arena);

    // Calls before(block) for each block of kBlock rows, mines and sums, then calls
    // after(worker, mean, row) for each row that is summed, with (padded,) of room for its mean.
    void run(const std::function<void(int64_t)>& before,
             const std::function<void(size_t, float*, int64_t)>& after);

    const Kernels& kernels;
    size_t threads;
    Task mining{}, sums{};  // of no rows where it is not wanted

  private:
    void merge_heaps(int64_t row) const;
    void list_hidden(int64_t row) const;

    float* topk_sim_;      // (B, topk) or null
    int64_t* topk_index_;  // (B, topk)
    std::vector<Worker> miners_, summers_;
};

// What all chunks of the bank together give a row.
struct Sums {
    double lse, sq_lse, count;
};
// Writes the mean (padded,) as well, where the task wants one.
Sums merge_sums(const Kernels& kernels, const Task& task, int64_t row, float* mean);

}  // namespace psm::cpu
