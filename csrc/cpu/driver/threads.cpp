// Threads for the length of one call: torch's own where its OpenMP runtime is in the process, else
// new ones that end with the call.

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "pass.h"

namespace psm::cpu {
namespace {

// After an operator of torch its threads spin for some 8 ms; threads of ours would have to share the
// processors with them, 4 of the pass's 54 ms at 256 x 65,536 x 128. A fork leaves them behind.
using GompParallel = void (*)(void (*)(void*), void*, unsigned count, unsigned flags);
const auto gomp_parallel =
    reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

// Whether this process is a fork without exec, which may have left torch's threads behind before it
// loaded this module: bit PF_FORKNOEXEC of the flags in /proc/self/stat.
bool is_fork() {
    std::ifstream stat("/proc/self/stat");
    stat.ignore(std::numeric_limits<std::streamsize>::max(), ')');
    std::string skipped;
    for (int field = 3; field < 9; ++field) stat >> skipped;
    unsigned long flags = 0;
    stat >> flags;
    return flags & 0x40;
}

bool forked = is_fork();
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Call {
    const std::function<void(size_t)>& job;
    std::atomic<size_t> next{0};
};

void enter(void* argument) {
    Call& call = *static_cast<Call*>(argument);
    call.job(call.next.fetch_add(1));
}

void run_threads(size_t count, const std::function<void(size_t)>& job) {
    if (count <= 1) return job(0);
    Call call{job};
    if (gomp_parallel != nullptr && !forked)
        return gomp_parallel(enter, &call, unsigned(count), 0);
    std::vector<std::thread> others;
    try {
        for (size_t i = 1; i < count; ++i) others.emplace_back(enter, &call);
    } catch (const std::system_error&) {
        // The system grants no more: those that run do it all.
    }
    enter(&call);
    for (std::thread& other : others) other.join();
}

// Waits are short: the others are at their last items. But one of them may have lost its processor.
void wait_until(const std::atomic<int64_t>& value, int64_t wanted) {
    for (int spins = 0; value.load(std::memory_order_acquire) < wanted;) {
        if (++spins > 4000) {
            std::this_thread::yield();
        } else {
#if PSM_X86
            __builtin_ia32_pause();
#endif
        }
    }
}

}  // namespace

// Threads take items from a shared counter, and wait for items, not for one another: it does not
// matter how many the system grants.
void run_phases(size_t threads, const std::vector<Phase>& phases) {
    struct alignas(64) Progress {
        std::atomic<int64_t> taken{0}, done{0};
    };
    std::vector<Progress> progress(phases.size());
    run_threads(threads, [&](size_t worker) {
        for (size_t p = 0; p < phases.size(); ++p) {
            const auto& [items, run] = phases[p];
            for (int64_t item; (item = progress[p].taken.fetch_add(1)) < items;) {
                run(worker, item);
                progress[p].done.fetch_add(1, std::memory_order_release);
            }
            wait_until(progress[p].done, items);
        }
    });
}

}  // namespace psm::cpu
