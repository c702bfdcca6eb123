// A pass over the bank from its arguments to the sums of each row. Compiled, as all of driver/, for
// the baseline processor.
#pragma once

#include <functional>
#include <string>

#include "../kernels/task.h"
#include "cpu.h"
#include "workspace.h"

namespace psm::cpu {

const Kernels& choose(const std::string& isa, Dtype dtype);

struct Threads {
    size_t used, most;  // what the work is worth, of those that torch has
};

// run(worker, item) for each of `items` items, in any order, worker < threads.used. Threads take
// items from a shared counter: it does not matter how many the system grants.
void run_items(const Threads& threads, int64_t items,
               const std::function<void(size_t, int64_t)>& run);

class Pass {
  public:
    Pass(const PassArgs& args, const std::string& isa, int threads);

    void lay_out(Arena& arena) {
        mining.lay_out(kernels, arena);
        sums.lay_out(kernels, arena);
    }

    // Calls before(block) for each block of kBlock rows, mines and sums, then calls
    // after(worker, mean, row) for each row that is summed, with (padded,) of room for its mean.
    void run(const std::function<void(int64_t)>& before,
             const std::function<void(size_t, float*, int64_t)>& after);

    const Kernels& kernels;
    Threads threads;
    Stage mining, sums;  // without rows where they are not wanted

  private:
    void merge_heaps(int64_t row) const;
    void list_hidden(int64_t row) const;

    float* topk_sim_;      // (B, topk) or null
    int64_t* topk_index_;  // (B, topk)
};

// What all chunks of the bank together give a row.
struct Sums {
    double lse, sq_lse, count;
};
// Writes the mean (padded,) as well, where the task wants one.
Sums merge_sums(const Kernels& kernels, const Task& task, int64_t row, float* mean);

}  // namespace psm::cpu
