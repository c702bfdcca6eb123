// The write of a ring buffer: a batch normalized, cast and stored; then ptr and count advance.
#pragma once

#include "rows.cuh"

namespace psm::cuda {

// A row with a NaN or an infinity is stored as zeros, as is a row of zeros.
template <class Key, class Row>
PSM_DEVICE void enqueue_rows(const EnqueueArgs& args) {
    const int lane = thread_index() % 32;
    const int64_t dim = args.bank.dim, slots = args.bank.slots, ptr = *args.ptr;
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
            args.bank_ids[slot] = args.ids == nullptr ? -1 : args.ids[row];
        }
    }
}

// In a launch of its own: then every row has read ptr.
PSM_DEVICE void advance(const EnqueueArgs& args) {
    auto* count = const_cast<int64_t*>(args.bank.count);
    const int64_t slots = args.bank.slots, filled = *count + args.batch;
    *args.ptr = (*args.ptr + args.batch) % slots;
    *count = filled < slots ? filled : slots;
}

}  // namespace psm::cuda
