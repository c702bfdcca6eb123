// Runs one CTA at a time on one CPU core: a fiber per CUDA thread, switched wherever a thread waits
// for another. Asynchronous work is done as late as the PTX ISA allows (when somebody waits for it)
// or, for bulk copies, at a random moment, so that a missing wait reads old data; a wait that can
// never end is reported. It knows nothing of time or of the memory model.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace psm::emulator {

constexpr size_t kStackBytes = 96 << 10;
constexpr uint32_t kSharedStart = 1024;  // where dynamic shared memory begins on sm_90
constexpr int kWarpSize = 32, kWarpgroupSize = 128;

#if defined(__x86_64__)
using Context = void*;
extern "C" void psm_switch_fiber(Context* from, Context* to);
asm(R"(
.text
psm_switch_fiber:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
inline void switch_fiber(Context& from, Context& to) { psm_switch_fiber(&from, &to); }
inline void start_context(Context& context, char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // 16-byte aligned at the call
    *top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_fiber(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_context(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {stack, 0, kStackBytes};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

struct Mbarrier {
    int expected, pending;  // arrivals
    int64_t bytes;          // outstanding transaction bytes of the current phase
    int phase;
};

// A collective of a warp or warpgroup: the last thread to come does the work for all.
struct Collective {
    std::vector<void*> arguments;
    const void* what = nullptr;
    int arrived = 0;
    uint64_t generation = 0;
};

struct Copy {
    char* target;
    const void* source;
    int bytes;
};

struct Product;  // a wgmma under way, see emulated_primitives.h

struct Thread {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool finished = true;
    std::vector<Copy> copies;  // not committed yet
    std::vector<std::vector<Copy>> copy_groups;
    std::vector<std::shared_ptr<Product>> products;
    std::vector<std::vector<std::shared_ptr<Product>>> product_groups;
    std::vector<uint32_t> unfenced;  // 16-byte units of shared memory written by ordinary stores
};

class Block {
   public:
    int threads = 0, index = 0, grid = 0, current = 0;
    uint64_t progress = 0;  // changes whenever something happened that somebody may wait for
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Thread> thread;
    std::vector<Collective> warp, warpgroup;
    Collective barrier;
    std::map<uint32_t, Mbarrier> mbarrier;
    std::vector<std::function<void()>> bulk_copies;
    std::vector<int> unfenced;  // per 16-byte unit: ordinary stores that no proxy fence followed
    std::string error;
    std::mt19937 random{1};

    static Block& get() {
        static Block block;
        return block;
    }
    Thread& self() { return thread[current]; }
    void yield() { switch_fiber(self().context, scheduler_); }
    [[noreturn]] void fail(const std::string& what) {
        if (error.empty()) error = "thread " + std::to_string(current) + ": " + what;
        for (;;) yield();
    }
    char* at(uint32_t address, size_t bytes) {
        if (address < kSharedStart || address - kSharedStart + bytes > shared_bytes)
            fail("shared address " + std::to_string(address) + " is out of range");
        return shared + (address - kSharedStart);
    }
    void collective(Collective& group, int rank, int size, const void* what, void* argument,
                    const std::function<void(std::vector<void*>&)>& work) {
        if (group.arrived == 0) {
            group.what = what;
            group.arguments.assign(size, nullptr);
        } else if (group.what != what) {
            fail("threads of one group execute different instructions");
        }
        group.arguments[rank] = argument;
        if (++group.arrived == size) {
            group.arrived = 0;
            ++group.generation;
            ++progress;
            work(group.arguments);
        } else {
            const uint64_t generation = group.generation;
            while (group.generation == generation) yield();
        }
    }
    void run(int block_index, int grid_size, int block_threads, size_t bytes,
             const std::function<void(char*)>& body);

   private:
    Context scheduler_;
    std::function<void(char*)> body_;
    std::unique_ptr<char[]> memory_;
    static void entry() {
        Block& block = get();
        block.body_(block.shared);
        block.self().finished = true;
        ++block.progress;
        for (;;) block.yield();
    }
};

inline void Block::run(int block_index, int grid_size, int block_threads, size_t bytes,
                       const std::function<void(char*)>& body) {
    index = block_index, grid = grid_size, threads = block_threads, shared_bytes = bytes;
    body_ = body;
    memory_.reset(new char[bytes + 1024]);
    shared = memory_.get() + (1024 - reinterpret_cast<uintptr_t>(memory_.get()) % 1024);
    std::memset(shared, 0xFF, bytes);  // NaN in every floating type
    thread.resize(threads);
    warp.assign(threads / kWarpSize, {});
    warpgroup.assign((threads + kWarpgroupSize - 1) / kWarpgroupSize, {});
    barrier = {}, mbarrier.clear(), bulk_copies.clear(), error.clear();
    unfenced.assign(bytes / 16 + 1, 0);
    for (Thread& t : thread) {
        start_context(t.context, t.stack.get(), entry);
        t.finished = false;
        t.copies.clear(), t.copy_groups.clear(), t.products.clear(), t.product_groups.clear();
        t.unfenced.clear();
    }
    std::vector<int> order(threads / kWarpSize);
    for (size_t w = 0; w < order.size(); ++w) order[w] = int(w);
    for (int left = threads; left > 0;) {
        std::shuffle(order.begin(), order.end(), random);
        const uint64_t before = progress;
        left = threads;
        for (int w : order) {
            for (int lane = 0; lane < kWarpSize; ++lane) {
                current = w * kWarpSize + lane;
                if (!self().finished) switch_fiber(scheduler_, self().context);
                left -= self().finished;
                if (!error.empty()) throw std::runtime_error("emulator: " + error);
            }
        }
        const bool idle = progress == before;
        if (!bulk_copies.empty() && (idle || random() % 4 == 0)) {
            const size_t pick = random() % bulk_copies.size();  // bulk copies end in any order
            auto copy = bulk_copies[pick];
            bulk_copies.erase(bulk_copies.begin() + pick);
            copy();
            ++progress;
        } else if (idle && left > 0) {
            throw std::runtime_error("emulator: deadlock, " + std::to_string(left) +
                                     " threads wait for something that cannot come");
        }
        if (!error.empty()) throw std::runtime_error("emulator: " + error);
    }
    for (Thread& t : thread)
        if (!t.copies.empty() || !t.copy_groups.empty() || !t.product_groups.empty())
            throw std::runtime_error("emulator: a thread ended with copies or products under way");
}

inline void launch(int grid, int threads, size_t shared_bytes,
                   const std::function<void(char*)>& body) {
    for (int block = 0; block < grid; ++block)
        Block::get().run(block, grid, threads, shared_bytes, body);
}

}  // namespace psm::emulator
