// The bank pass over one chunk of the bank, written once for every instruction set. Included by
// isa_*.cpp after simd_*.h, inside a namespace of its own.

constexpr int kFlight = 4;  // vectors side by side, where each alone would wait for its latencies

#include "rows.inl"
#include "pack.inl"
#include "product.inl"
#include "mine.inl"
#include "noise.inl"
#include "weigh.inl"
#include "finish.inl"

// The next tile on its way from memory to L2, a slice per row block.
struct Upcoming {
    const char* rows;
    int64_t lines, lines_per_block;
};

Upcoming upcoming(const Task& t, int64_t slot, int64_t blocks) {
    const int64_t row_bytes = t.dim * (t.dtype == Dtype::kFloat32 ? 4 : 2);
    const int64_t lines = smaller(t.tile, t.count - slot) * row_bytes / 64;
    return {(const char*)t.bank + slot * row_bytes, lines, lines / blocks + 1};
}

INLINE void prefetch(const Upcoming& next, int64_t block) {
    const int64_t last = smaller((block + 1) * next.lines_per_block, next.lines);
    for (int64_t line = block * next.lines_per_block; line < last; ++line)
        __builtin_prefetch(next.rows + 64 * line, 0, 2);
}

// One item: one group of rows over one chunk of the bank.

template <int kRows>
void process_block(const Task& t, Worker& w, const Tile& tile, int64_t block, int64_t first_row,
                   int64_t place, float* mean) {
    if (!t.sums) return mine<kRows>(t, w, tile, block);
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        float* scores = w.scores + place * kTile + panel * kSub;
#if PSM_PAIRS
        if (t.query_pairs) {
            const int64_t pairs = t.padded / 2;
            product_pairs<kRows>(t.query_pairs + block * pairs * kBlock,
                                 w.pairs + panel * pairs * kSub, pairs, scores);
            continue;
        }
#endif
        product<kRows>(t.query_panel + block * t.dim * kBlock, w.panel + panel * t.dim * kSub,
                       t.dim, scores);
    }
    mean += block * kBlock * t.padded;
    for (int r = 0; r < kRows; ++r) {
        const int64_t i = block * kBlock + r, local = i - first_row;
        float* state = w.state + local * 3 * kLanes;
        const RowSums row{state,           state + kLanes,      state + 2 * kLanes,
                          w.shift + local, w.sq_shift + local, mean + r * t.padded,
                          w.kept + (place + r) * kTile / kSub,
                          w.next + local};
        float* scores = w.scores + (place + r) * kTile;
        if (t.selection == Selection::kBernoulli)
            weigh<Selection::kBernoulli>(t, w, tile, i, row, scores);
        else if (t.selection == Selection::kExpected)
            weigh<Selection::kExpected>(t, w, tile, i, row, scores);
        else if (t.selection == Selection::kAffine)
            weigh<Selection::kAffine>(t, w, tile, i, row, scores);
        else
            weigh<Selection::kAll>(t, w, tile, i, row, scores);
#if PSM_PAIRS
        if (t.query_pairs)
            for (int j = 0; j < tile.width; j += 2 * kWidth)
                store_pairs(w.weight_pairs + (r * kTile + j) / 2, load(scores + j),
                            load(scores + j + kWidth));
#endif
    }
    if (t.mean && !skips_slots(t)) accumulate_rows<kRows>(t, w, tile, mean);
}

void process(const Task& t, Worker& w, int64_t item) {
    constexpr decltype(&process_block<1>) kProcess[kBlock] = {
        process_block<1>, process_block<2>, process_block<3>,
        process_block<4>, process_block<5>, process_block<6>};
    const int64_t group = item / t.chunks, chunk = item % t.chunks;
    const int64_t first_block = group * t.group_blocks;
    const int64_t last_block = smaller(first_block + t.group_blocks, t.blocks);
    const int64_t first_row = first_block * kBlock, last_row = smaller(last_block * kBlock, t.rows);
    const int64_t rows = last_row - first_row;
    float* mean = nullptr;
    if (t.sums) {
        mean = t.part_mean + chunk * t.rows * t.padded;
        if (t.mean)
            __builtin_memset(mean + first_row * t.padded, 0,
                             size_t(rows * t.padded) * sizeof(float));
        __builtin_memset(w.state, 0, size_t(rows * 3 * kLanes) * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            w.shift[r] = w.sq_shift[r] = -kInfinity;
            w.next[r] = t.hidden + (first_row + r) * t.most_hidden;
        }
    }
    const int64_t last_tile = (chunk + 1) * t.tiles / t.chunks;
    for (int64_t index = chunk * t.tiles / t.chunks; index < last_tile; ++index) {
        const Tile tile = pack_tile(t, w, index);
        if (t.sums && t.selection == Selection::kBernoulli)
            pack_philox_columns(t, tile, w.columns);
        const Upcoming next = upcoming(t, index + 1 < last_tile ? tile.slot + t.tile : t.count,
                                       last_block - first_block);
        const int64_t gang = skips_slots(t) ? kGang : 1;
        for (int64_t first = first_block; first < last_block; first += gang) {
            const int64_t last = smaller(first + gang, last_block);
            for (int64_t block = first; block < last; ++block) {
                prefetch(next, block - first_block);
                const int64_t left = t.rows - block * kBlock, place = (block - first) * kBlock;
                kProcess[smaller(left, kBlock) - 1](t, w, tile, block, first_row, place, mean);
            }
            const int64_t row = first * kBlock;
            if (skips_slots(t))
                accumulate_kept_rows(t, w, tile, smaller(last * kBlock, t.rows) - row,
                                     mean + row * t.padded);
        }
    }
    for (int64_t r = 0; t.sums && r < rows; ++r) {
        const int64_t at = chunk * t.rows + first_row + r;
        float lanes[3];
        for (int n = 0; n < 3; ++n) {
            V total = set1(0.0f);
            for (int j = 0; j < kLanes; j += kWidth)
                total = add(total, load(w.state + (3 * r + n) * kLanes + j));
            lanes[n] = sum(total);
        }
        t.part_sum[at] = lanes[0], t.part_sq[at] = lanes[1], t.part_count[at] = lanes[2];
        t.part_shift[at] = w.shift[r];
        const bool own = t.selection == Selection::kExpected;
        t.part_sq_shift[at] = own ? w.sq_shift[r] : 2.0f * w.shift[r];
    }
}
