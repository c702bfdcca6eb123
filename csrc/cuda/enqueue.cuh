// The ring buffer's write in one kernel: normalize, cast, store a batch, advance ptr and count.
#pragma once

#include "pass.cuh"

namespace psm::cuda {

constexpr int kEnqueueThreads = 256;

struct EnqueueArgs {
    const void* keys;             // (B, D)
    const int64_t *labels, *ids;  // (B,) or null: unknown
    void* bank;                   // (K, D)
    int64_t *bank_labels, *bank_ids;  // (K,)
    int64_t *ptr, *count;         // ()
    int* ticket;                  // () blocks that are done; 0 between calls
    int64_t batch, slots;
    int dim;
};

template <class T>
PSM_DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        return {uint16_t(pack<T>(x, x))};
    }
}

// One warp per key. A row with a NaN or an infinity is stored as zeros, as is a row of zeros.
template <class Key, class Bank>
PSM_DEVICE void enqueue_rows(const EnqueueArgs& args) {
    const int lane = thread_index() % 32, warps = block_size() / 32;
    const int64_t ptr = *args.ptr;
    const int64_t skipped = args.batch > args.slots ? args.batch - args.slots : 0;
    for (int64_t row = skipped + block_index() * warps + thread_index() / 32; row < args.batch;
         row += int64_t(grid_size()) * warps) {
        const Key* key = static_cast<const Key*>(args.keys) + row * args.dim;
        const int64_t slot = (ptr + row) % args.slots;
        Bank* target = static_cast<Bank*>(args.bank) + slot * args.dim;
        float square = 0;
        for (int d = lane; d < args.dim; d += 32)
            square = fmaf(to_float(key[d]), to_float(key[d]), square);
        for (int mask = 16; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
        const float norm = square_root(square);
        const bool drop = square == 0 || norm != norm || norm > 3.4e38f;
        for (int d = lane; d < args.dim; d += 32)
            target[d] = from_float<Bank>(drop ? 0.0f : to_float(key[d]) / norm);
        if (lane == 0) {
            args.bank_labels[slot] = args.labels == nullptr ? -1 : args.labels[row];
            args.bank_ids[slot] = args.ids == nullptr ? -1 : args.ids[row];
        }
    }
    block_sync();  // every thread of this block has read ptr
    if (thread_index() != 0) return;
    fence_device();
    if (atomic_add(args.ticket, 1) != grid_size() - 1) return;
    *args.ptr = (ptr + args.batch) % args.slots;  // the last block: all others have read it
    const int64_t filled = *args.count + args.batch;
    *args.count = filled < args.slots ? filled : args.slots;
    *args.ticket = 0;
}

}  // namespace psm::cuda
