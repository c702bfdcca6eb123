// Slots that a row must not see: those that its list names, and those that hold its id. Before the
// pass both leave a bit for each 16 rows (those of a warp) by 64 slots in which there is one. In a
// tile with such a bit what is hidden becomes -inf, so that nothing of it is mined, summed or
// counted; the other tiles pay nothing.
#pragma once

#include "pass.cuh"

namespace psm::cuda {

constexpr int kFlagRows = 16, kFlagSlots = 64;
PSM_HD int64_t flag_words(const Hidden& hidden, int64_t batch) {  // of whole blocks of rows
    return (batch + 127) / 128 * (128 / kFlagRows) * hidden.words;
}
constexpr int kNoSlot = -16;  // names none: at most 15 slots lie before slot 0 in a tile

// `at` is a slot counted with `lead`.
PSM_DEVICE uint32_t& flag_word(const Hidden& hidden, int row, int at) {
    return hidden.flags[int64_t(row / kFlagRows) * hidden.words + at / (32 * kFlagSlots)];
}
PSM_DEVICE uint32_t flag_bit(int at) { return 1u << (at / kFlagSlots % 32); }
PSM_DEVICE void set_flag(const Hidden& hidden, int row, int at) {
    atomic_or(&flag_word(hidden, row, at), flag_bit(at));
}

// Slots that are not there become -inf; for tiles that are not whole.
template <int kTiles>
PSM_DEVICE void mask_slots(float (&s)[kTiles][4], const Walk& walk, int tile) {
    const int own = walk.start(tile) + 2 * (thread_index() % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int slot = own + 8 * n + i % 2;
            if (slot < walk.lead || slot >= walk.end) s[n][i] = -INFINITY;
        }
}

// Which of the next 64 columns from `start` on a thread must hide in its row, among those that it
// owns: bit 8 n + i for its column i of n8 tile n. All threads of a quad come with the same row.
PSM_DEVICE uint64_t hidden_columns(const KernelArgs& args, int row, const Walk& walk, int start,
                                   int columns) {
    const Hidden& hidden = args.hidden;
    const int c = thread_index() % 4, first = start - walk.lead;
    const int64_t inside = row < args.rows() ? row : args.rows() - 1;
    uint64_t mask = 0;
    const int* list = hidden.list + inside * hidden.listed;
#pragma unroll 1
    for (int i = 0; i < hidden.listed; i += 4) {
        const int slot = i + c < hidden.listed ? list[i + c] : kNoSlot;
        const unsigned at = unsigned(slot) - unsigned(first);
        mask |= uint64_t(at < unsigned(columns)) << at % 64;
    }
    mask |= shuffle_xor(mask, 1);
    mask |= shuffle_xor(mask, 2);
    mask = mask >> 2 * c & 0x0303030303030303;
    if (args.exclude.ids == nullptr) return mask;
    const int64_t id = args.exclude.ids[inside];
#pragma unroll 1
    for (int i = 0; i < columns / 4; ++i) {
        const int column = i / 2 * 8 + i % 2, slot = first + 2 * c + column;
        const bool there = slot >= 0 && slot < walk.end - walk.lead;
        const int64_t held = args.exclude.bank_ids[there ? slot : 0];
        mask |= uint64_t(there && (held == id || held == kEmpty)) << column;
    }
    return mask;
}

// Finds the tiles of a walk in which something must become -inf; all others cost a comparison.
template <int kTileSlots>
struct Masks {
    const uint32_t* words;  // of the warp's rows, if any
    int next;               // tile

    PSM_DEVICE Masks(const KernelArgs& args, const int (&row)[2], const Walk& walk)
        : words(args.hidden.flags ? &flag_word(args.hidden, row[0], 0) : nullptr),
          next(find(args, walk, 0)) {}

    // From `tile` on; lanes look at a word each. Tiles that are not whole come first and last.
    PSM_DEVICE int find(const KernelArgs& args, const Walk& walk, int tile) const {
        constexpr int kWordSlots = 32 * kFlagSlots;
        if (!walk.whole(tile)) return tile;
        const int wholes = walk.first_whole + int(walk.wholes), lane = thread_index() % 32;
        const int last = wholes < walk.tiles ? wholes : walk.tiles;
        if (args.hidden.flags == nullptr) return last;  // the warp as one: `words` differ
        const int start = walk.start(tile), end = (walk.start(last) - 1) / kWordSlots + 1;
        for (int first = start / kWordSlots; first < end; first += 32) {
            uint32_t word = first + lane < end ? words[first + lane] : 0;
            if (first + lane == start / kWordSlots) word &= ~0u << start % kWordSlots / kFlagSlots;
            if (!warp_any(word != 0)) continue;
            const int found = first_bit(warp_ballot(word != 0));
            const int at = 32 * (first + found) + first_bit(shuffle_from(word, found));
            const int marked = at * kFlagSlots / kTileSlots - walk.first_tile;
            return int(warp_uniform(marked < tile ? tile : marked < last ? marked : last));
        }
        return last;
    }

    // `gone` counts what is hidden from the thread's two rows, among its own columns.
    template <int kTiles>
    PSM_DEVICE void apply(float (&s)[kTiles][4], const KernelArgs& args, const int (&row)[2],
                          const Walk& walk, int tile, int (&gone)[2]) {
        if (!walk.whole(tile)) mask_slots(s, walk, tile);
        next = find(args, walk, tile + 1);
        constexpr int kUnitTiles = kTiles < 8 ? kTiles : 8;
#pragma unroll
        for (int unit = 0; args.hidden.flags != nullptr && unit < kTiles; unit += kUnitTiles) {
            const int start = walk.start(tile) + 8 * unit;
            if (!warp_any(words[start / (32 * kFlagSlots)] & flag_bit(start))) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint64_t mask = hidden_columns(args, row[r], walk, start, 8 * kUnitTiles);
                gone[r] += bits_set(mask);
#pragma unroll
                for (int n = 0; n < kUnitTiles; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (mask >> (8 * n + i) & 1) s[unit + n][2 * r + i] = -INFINITY;
            }
        }
    }
};

// One slot, for those few that are looked at again.
PSM_DEVICE bool is_hidden(const KernelArgs& args, int row, int slot) {
    const Hidden& hidden = args.hidden;
    const int at = slot + lead_slots(args.options.col_offset);
    if (hidden.flags == nullptr || !(flag_word(hidden, row, at) & flag_bit(at))) return false;
    bool found = false;
    for (int i = 0; i < hidden.listed; ++i)
        found |= hidden.list[int64_t(row) * hidden.listed + i] == slot;
    if (args.exclude.ids == nullptr) return found;
    const int64_t held = args.exclude.bank_ids[slot];
    return found || held == args.exclude.ids[row] || held == kEmpty;
}

// --- before the pass ---

constexpr int kMarkThreads = 256, kMarkRows = 1024, kBuckets = 1024;

struct MarkShared {  // a hash table of some rows' ids: the first row of a bucket, and the next ones
    int first[kBuckets], next[kMarkRows];
    int64_t id[kMarkRows];
};

PSM_DEVICE int bucket_of(int64_t id) {
    return int((uint32_t(id) ^ uint32_t(id >> 32)) * 0x9E3779B1u >> 22);
}

// Lists as 32-bit slots, kNoSlot for what names none and for places that mining fills later.
PSM_DEVICE void mark_lists(const KernelArgs& args) {
    const Hidden& hidden = args.hidden;
    const int count = valid_slots(args), lead = lead_slots(args.options.col_offset);
    const int64_t all = args.batch * hidden.listed;
    for (int64_t at = int64_t(block_index()) * kMarkThreads + thread_index(); at < all;
         at += int64_t(grid_size()) * kMarkThreads) {
        const int64_t row = at / hidden.listed, i = at % hidden.listed;
        const int64_t given = args.exclude.listed;
        const int64_t slot = i < given ? args.exclude.slots[row * given + i] : -1;
        const bool inside = slot >= 0 && slot < count;
        hidden.list[at] = inside ? int(slot) : kNoSlot;
        if (inside) set_flag(hidden, int(row), int(slot) + lead);
    }
}

// Each CTA looks its slots up in a table of the rows' ids: K B / 1024 look-ups in all.
PSM_DEVICE void mark_ids(const KernelArgs& args, MarkShared& shared) {
    const Hidden& hidden = args.hidden;
    const int thread = thread_index(), lead = lead_slots(args.options.col_offset);
    const int end = valid_slots(args) + lead;
    for (int row = 0; row < args.rows(); row += kMarkRows) {
        const int rows = args.rows() - row < kMarkRows ? args.rows() - row : kMarkRows;
        for (int i = thread; i < kBuckets; i += kMarkThreads) shared.first[i] = -1;
        block_sync();
        for (int i = thread; i < rows; i += kMarkThreads) {
            const int64_t id = shared.id[i] = args.exclude.ids[row + i];
            if (id != kEmpty)  // unknown rows see all but empty slots
                shared.next[i] = atomic_exchange(&shared.first[bucket_of(id)], i);
        }
        block_sync();
        for (int start = block_index() * kMarkThreads; start < end;
             start += grid_size() * kMarkThreads) {
            const int at = start + thread;
            const bool inside = at >= lead && at < end;
            const int64_t held = inside ? args.exclude.bank_ids[at - lead] : 0;
            for (int i = inside ? shared.first[bucket_of(held)] : -1; i >= 0; i = shared.next[i])
                if (shared.id[i] == held) set_flag(hidden, row + i, at);
            if (warp_any(inside && held == kEmpty))  // a warp's 32 slots share their flags
                for (int i = thread % 32 * kFlagRows; i < rows; i += 32 * kFlagRows)
                    set_flag(hidden, row + i, at);
        }
        block_sync();  // the next rows overwrite the table
    }
}

}  // namespace psm::cuda
