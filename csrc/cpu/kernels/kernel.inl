// The bank pass over one chunk of the bank, written once for every instruction set. Included by
// isa_*.cpp after simd_*.h, inside a namespace of its own.

constexpr int kFlight = 4;  // vectors side by side, where each alone would wait for its latencies

#include "rows.inl"
#include "queries.inl"
#include "pack.inl"
#include "product.inl"
#include "mine.inl"
#include "noise.inl"
#include "weigh.inl"
#include "finish.inl"
#include "enqueue.inl"

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

float sum_lanes(const float* lanes) {
    V total = set1(0.0f);
    for (int j = 0; j < kLanes; j += kWidth) total = add(total, load(lanes + j));
    return sum(total);
}

constexpr decltype(&weigh<Selection::kAll>) kWeigh[] = {  // in the order of Selection
    weigh<Selection::kBernoulli>, weigh<Selection::kExpected>, weigh<Selection::kAll>,
    weigh<Selection::kAffine>};

// One item: one group of rows over one chunk of the bank.

template <int kRows>
void process_block(const Task& t, Worker& w, const Tile& tile, int64_t block, int64_t first_row,
                   int64_t place, float* mean) {
    if (!t.sums) return mine<kRows>(t, w, tile, block);
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        float* scores = w.scores + place * kTile + panel * kSub;
#if PAIRS
        if (t.query_pairs) {
            const int64_t pairs = t.padded / 2;
            product<Pairs, kRows>(t.query_pairs + block * pairs * kBlock,
                                  w.pairs + panel * pairs * kSub, pairs, scores);
            continue;
        }
#endif
        product<Floats, kRows>(t.query_panel + block * t.dim * kBlock,
                               w.panel + panel * t.dim * kSub, t.dim, scores);
    }
    mean += block * kBlock * t.padded;
    for (int r = 0; r < kRows; ++r) {
        const int64_t i = block * kBlock + r;
        float* scores = w.scores + (place + r) * kTile;
        kWeigh[int(t.selection)](t, w, tile, i, w.sums[i - first_row], mean + r * t.padded,
                                 w.kept + (place + r) * kTile / kSub, scores);
#if PAIRS
        if (t.query_pairs)
            for (int j = 0; j < tile.width; j += 2 * kWidth)
                store_pairs(w.weight_pairs + (r * kTile + j) / 2, load(scores + j),
                            load(scores + j + kWidth));
#endif
    }
    if (!t.mean || skips_slots(t)) return;
#if PAIRS
    if (t.query_pairs)
        return accumulate_rows<Pairs, kRows>(w.weight_pairs, w.row_pairs, tile.high, t.padded, mean);
#endif
    accumulate_rows<Floats, kRows>(w.scores, tile.rows, tile.high, t.padded, mean);
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
        for (int64_t r = 0; r < rows; ++r)
            w.sums[r] = {
                {}, {}, {}, -kInfinity, -kInfinity, t.hidden + (first_row + r) * t.most_hidden};
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
        const RowSums& row = w.sums[r];
        const bool own = t.selection == Selection::kExpected;
        t.parts[chunk * t.rows + first_row + r] = {
            sum_lanes(row.sum), sum_lanes(row.squares), sum_lanes(row.count), row.shift,
            own ? row.sq_shift : 2.0f * row.shift};
    }
}
