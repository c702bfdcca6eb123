// The write of a ring: kernels make the rows; names, pointer and count are written here.

#include <algorithm>

#include "pass.h"

namespace psm::cpu {

void enqueue(const EnqueueArgs& args, const std::string& isa, int most_threads) {
    constexpr int64_t kRows = 64;              // of one item
    constexpr int64_t kThreadElements = 1 << 19;  // some 100 us, a few times what a thread costs
    const Kernels& kernels = choose(isa, args.bank.dtype);
    const int64_t slots = args.bank.slots, batch = args.batch;
    const int64_t start = (*args.ptr % slots + slots) % slots;
    const int64_t skipped = std::max<int64_t>(batch - slots, 0);  // overwritten at once
    const int64_t used = (batch - skipped) * args.bank.dim / kThreadElements;
    const Threads threads{size_t(std::clamp<int64_t>(used, 1, most_threads)), size_t(most_threads)};
    run_items(threads, ceil_div(batch - skipped, kRows), [&](size_t, int64_t item) {
        const int64_t first = skipped + item * kRows, last = std::min(batch, first + kRows);
        for (int64_t row = first; row < last; ++row) {
            const int64_t slot = (start + row) % slots;
            kernels.enqueue_row(args, row, slot);
            args.bank_labels[slot] = args.labels ? args.labels[row] : -1;
            args.bank_ids[slot] = args.ids ? std::max<int64_t>(args.ids[row], -1) : -1;
        }
    });
    auto* count = const_cast<int64_t*>(args.bank.count);
    *args.ptr = (start + batch) % slots;
    *count = std::min(*count + batch, slots);
    if (args.rng_state) ++args.rng_state[1];
}

}  // namespace psm::cpu
