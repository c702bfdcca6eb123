// Threads for the length of one call: none is left running, none has to survive a fork.

#include <pthread.h>
#include <sched.h>

#include <vector>

#include "driver.h"

namespace psm::cpu {
namespace {

struct Call {
    const std::function<void(size_t)>& job;
    pthread_attr_t elsewhere;
#ifdef __GLIBC__
    cpu_set_t allowed;
#endif
};

struct Thread {
    Call* call;
    size_t index;
    pthread_t handle;
};

// Linux likes to start a thread on the processor of its parent, where it waits: 1 to 3 ms measured
// after a sleep. So it has to start on any other, 0.05 ms, and may go anywhere from then on.
void find_elsewhere([[maybe_unused]] Call& call) {
#ifdef __GLIBC__
    if (sched_getaffinity(0, sizeof call.allowed, &call.allowed) != 0) CPU_ZERO(&call.allowed);
    cpu_set_t others = call.allowed;
    CPU_CLR(sched_getcpu(), &others);
    if (CPU_COUNT(&others) > 0)
        pthread_attr_setaffinity_np(&call.elsewhere, sizeof others, &others);
#endif
}

void* enter(void* argument) {
    const Thread& thread = *static_cast<Thread*>(argument);
#ifdef __GLIBC__
    pthread_setaffinity_np(pthread_self(), sizeof thread.call->allowed, &thread.call->allowed);
#endif
    thread.call->job(thread.index);
    return nullptr;
}

}  // namespace

void run_threads(size_t count, const std::function<void(size_t)>& job) {
    if (count <= 1) return job(0);
    Call call{job};
    pthread_attr_init(&call.elsewhere);
    find_elsewhere(call);
    std::vector<Thread> others(count - 1);
    size_t started = 0;
    for (Thread& thread : others) {
        thread.call = &call, thread.index = started + 1;
        if (pthread_create(&thread.handle, &call.elsewhere, enter, &thread) != 0 &&
            pthread_create(&thread.handle, nullptr, enter, &thread) != 0)
            break;
        ++started;
    }
    job(0);
    for (size_t i = 0; i < started; ++i) pthread_join(others[i].handle, nullptr);
    pthread_attr_destroy(&call.elsewhere);
}

}  // namespace psm::cpu
