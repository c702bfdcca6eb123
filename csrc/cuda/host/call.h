// A call of the backend: its device, the launches on its stream, its workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "runtime.h"

namespace psm::cuda {

// The same code says how much workspace it needs: then it starts nothing, addresses are made up.
class Call {
   public:
    explicit Call(const Place& place, bool measures = false)
        : place(place),
          measures(measures),
          guard_(place.device),
          start_(measures ? kAlignment : uintptr_t(place.workspace)) {}

    const Place& place;
    const bool measures;

    template <class V>
    V* take(int64_t count) {
        if (start_ == 0) throw std::invalid_argument("workspace: got a null pointer");
        const size_t at = used_;
        used_ += (size_t(count) * sizeof(V) + kAlignment - 1) / kAlignment * kAlignment;
        bytes_ = std::max(bytes_, used_);
        return reinterpret_cast<V*>(start_ + at);
    }
    size_t used() const { return used_; }
    void release_to(size_t used) { used_ = used; }  // what was taken since may be taken again
    size_t bytes() const { return bytes_; }

    template <class... Argument>  // nothing here waits for the device
    void launch(const void* function, const char* name, int64_t grid, int threads,
                int shared_bytes, Argument&... argument) const {
        if (measures) return;
        void* arguments[] = {&argument...};
        const auto stream = static_cast<cudaStream_t>(place.stream);
        check(cudaLaunchKernel(function, dim3(unsigned(grid)), dim3(threads), arguments,
                               shared_bytes, stream),
              name);
        check_trap(stream, name);
    }
    void clear(void* array, size_t bytes) const {
        if (measures) return;
        check(cudaMemsetAsync(array, 0, bytes, static_cast<cudaStream_t>(place.stream)),
              "cudaMemsetAsync");
    }
    int multiprocessors() const {
        return attribute(cudaDevAttrMultiProcessorCount, place.device);
    }
    // CTAs of a kernel that takes `pieces`, so many to a multiprocessor at once.
    int64_t small_grid(int64_t pieces, int to_each = 4) const {
        return std::min<int64_t>(pieces, to_each * multiprocessors());
    }

   private:
    static constexpr size_t kAlignment = 256;
    const DeviceGuard guard_;
    const uintptr_t start_;
    size_t used_ = 0, bytes_ = 0;
};

// The parts of a pass, for psm_step, whose kernels do the rest: clear the flags before it, and merge
// what it gives.
Hidden room_for_hidden(const PassArgs& args, Call& call);
KernelArgs run_pass(const PassArgs& args, Hidden hidden, Call& call);

// Every kernel of the file, for the current device.
void load_passes(int device);
void load_steps();
void load_enqueues();

}  // namespace psm::cuda
