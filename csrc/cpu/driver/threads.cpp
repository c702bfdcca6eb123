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
    size_t count;
    std::atomic<size_t> next{0};
};

void enter(void* argument) {
    Call& call = *static_cast<Call*>(argument);
    const size_t worker = call.next.fetch_add(1);
    if (worker < call.count) call.job(worker);
}

void run_threads(const Threads& threads, const std::function<void(size_t)>& job) {
    if (threads.used <= 1) return job(0);
    Call call{job, threads.used};
    // All of torch's threads: a smaller team would end the others, and torch start them again.
    if (gomp_parallel != nullptr && !forked)
        return gomp_parallel(enter, &call, unsigned(threads.most), 0);
    std::vector<std::thread> others;
    try {
        for (size_t i = 1; i < threads.used; ++i) others.emplace_back(enter, &call);
    } catch (const std::system_error&) {
        // The system grants no more: those that run do it all.
    }
    enter(&call);
    for (std::thread& other : others) other.join();
}

}  // namespace

// A barrier of our own between phases, in one parallel region, saves 5 us of a step of 275 and made
// torch's threads share a processor more often where the machine has other work: 12 ms a step.
void run_items(const Threads& threads, int64_t items,
               const std::function<void(size_t, int64_t)>& run) {
    if (items == 0) return;
    std::atomic<int64_t> next{0};
    run_threads(threads, [&](size_t worker) {
        for (int64_t item; (item = next.fetch_add(1)) < items;) run(worker, item);
    });
}

}  // namespace psm::cpu
