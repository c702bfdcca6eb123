// The write of a ring buffer: a batch normalized, cast and stored; then ptr and count advance.
#pragma once

#include "rows.cuh"

namespace psm::cuda {

// A slot fits 32 bits: the upper half of ptr, 0 between calls, counts the CTAs that are done, and the
// last of them moves ptr on, which clears it. So no launch is needed for that, and no memory.
PSM_DEVICE int lower_half(const int64_t* ptr) { return reinterpret_cast<const int*>(ptr)[0]; }
PSM_DEVICE int* upper_half(int64_t* ptr) { return reinterpret_cast<int*>(ptr) + 1; }

// A row with a NaN or an infinity is stored as zeros, as is a row of zeros.
template <class Key, class Row>
PSM_DEVICE void enqueue_rows(const EnqueueArgs& args) {
    const int lane = thread_index() % 32;
    const int64_t dim = args.bank.dim, slots = args.bank.slots, ptr = lower_half(args.ptr);
    const int64_t skipped = args.batch > slots ? args.batch - slots : 0;  // overwritten at once
    for (int64_t row = skipped + first_row(); row < args.batch; row += row_step()) {
        const Key* key = static_cast<const Key*>(args.keys) + row * dim;
        const int64_t slot = (ptr + row) % slots;
        Row* target = static_cast<Row*>(const_cast<void*>(args.bank.rows)) + slot * dim;
        const float norm = row_norm(key, int(dim));
        const bool drop = !(norm < INFINITY);
        for (int d = lane; d < dim; d += 32)
            target[d] = from_float<Row>(drop ? 0.0f : to_float(key[d]) / norm);
        if (lane == 0) {
            args.bank_labels[slot] = args.labels == nullptr ? -1 : args.labels[row];
            const int64_t id = args.ids == nullptr ? -1 : args.ids[row];
            args.bank_ids[slot] = id < -1 ? -1 : id;
        }
    }
    block_sync();  // the CTA has read ptr
    if (thread_index() != 0 || count_in(upper_half(args.ptr)) != grid_size() - 1) return;
    auto* count = const_cast<int64_t*>(args.bank.count);
    const int64_t filled = *count + args.batch;
    *args.ptr = (ptr + args.batch) % slots;
    *count = filled < slots ? filled : slots;
    if (args.rng_state != nullptr) ++args.rng_state[1];
}

}  // namespace psm::cuda
