// How a task is split, and the memory that it needs.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "../kernels/task.h"

namespace psm::cpu {

constexpr int64_t kMaxChunks = 24;  // 2, 3, 4, 6, 8, 12 and 24 threads divide it

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Carves aligned arrays out of one allocation; without one it only measures.
class Arena {
  public:
    static constexpr int64_t kAlign = 64;

    Arena() = default;
    explicit Arena(char* base) : base_(uintptr_t(base)) {}

    template <class T>
    void take(T*& array, int64_t count) {
        array = reinterpret_cast<T*>(base_ + uintptr_t(used_));
        used_ += ceil_div(count * int64_t(sizeof(T)), kAlign) * kAlign;
    }
    size_t bytes() const { return size_t(used_); }

  private:
    uintptr_t base_ = kAlign;  // not 0: an array that is there is not null, measured or not
    int64_t used_ = 0;
};

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;
Memory allocate(size_t bytes);

// Calls lay_out(arena) twice: to measure, and on memory of that size.
template <class LayOut>
Memory with_memory(LayOut lay_out) {
    Arena measured;
    lay_out(measured);
    Memory memory = allocate(measured.bytes());
    Arena arena(memory.get());
    lay_out(arena);
    return memory;
}

// Mining or summing, with the buffers of each thread. Without rows there is nothing to do.
struct Stage {
    Task task{};
    std::vector<Worker> workers;

    Stage() = default;
    Stage(const Task& task, size_t threads);  // sets how the task is cut
    void lay_out(const Kernels& kernels, Arena& arena);
    int64_t items() const { return task.rows ? task.groups * task.chunks : 0; }
};

}  // namespace psm::cpu
