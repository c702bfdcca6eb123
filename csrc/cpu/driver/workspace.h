// How a task is split, and the memory that it needs.
#pragma once

#include <cstdlib>
#include <memory>

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

// Sets how the task is cut into tiles, chunks and groups of rows.
void split(Task& task, size_t threads);
void lay_out(Task& task, const Kernels& kernels, Arena& arena);
void lay_out(Worker& worker, const Task& task, size_t index, Arena& arena);

}  // namespace psm::cpu
