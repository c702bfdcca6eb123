#include "workspace.h"

#include <algorithm>
#include <new>

#include "processor.h"

namespace psm::cpu {
namespace {

constexpr int64_t kPartialBytes = 32 << 20;  // of all chunks together
constexpr int64_t kMinGroupBlocks = 16;      // rows that share the packing of a tile
constexpr int64_t kDirectRows = 4;           // so few do not repay it

// Chunks depend on the problem and L2 alone, because sums are merged by chunk; groups of rows depend
// on the number of threads as well, because rows never meet.
void split(Task& t, size_t threads) {
    const int64_t workers = int64_t(threads);
    t.padded = ceil_div(t.dim, kPad) * kPad;
    t.direct = !t.sums && t.rows <= kDirectRows;
    t.lead = ((t.col_offset % 16) + 16) % 16;
    // A tile, packed twice, the queries and means of a group share L2; more slots use the registers
    // better.
    const int64_t kb = l2_bytes() >> 10, group_bytes = l2_bytes() / 8 * 3;
    t.tile = t.padded <= kb * 3 / 16 ? kTile : t.padded <= kb ? kTile / 2 : kTile / 4;
    t.tiles = t.count > 0 ? ceil_div(t.count + t.lead, t.tile) : 0;
    t.blocks = ceil_div(t.rows, kBlock);
    const int64_t row_bytes = t.sums ? t.padded * 4 : t.topk * 8;
    const int64_t affordable = kPartialBytes / std::max<int64_t>(t.rows * row_bytes, 1);
    t.chunks = std::clamp<int64_t>(std::min(t.tiles * t.tile / 256, affordable), 1, kMaxChunks);
    const int64_t block_bytes = kBlock * t.padded * (t.sums ? 8 : 1);
    t.group_blocks = std::max(group_bytes / block_bytes, kMinGroupBlocks);
    // A row that one thread mines alone has one heap, and half the insertions that two would have:
    // 1.7 to 1.3 s for 10,000 queries, 50,000 rows, D = 512, k = 200.
    if (!t.sums && ceil_div(t.blocks, t.group_blocks) >= 3 * workers) t.chunks = 1;
    while (ceil_div(t.blocks, t.group_blocks) * t.chunks < 2 * workers && t.group_blocks > 8)
        t.group_blocks = ceil_div(t.group_blocks, 2);
    t.groups = std::max<int64_t>(ceil_div(t.blocks, t.group_blocks), 1);
    t.group_blocks = ceil_div(t.blocks, t.groups);
    t.heap_sets = t.chunks > 1 ? workers : 1;  // with one chunk, a row has one thread
}

void lay_out(Task& t, const Kernels& kernels, Arena& arena) {
    const bool pairs = kernels.pairs && t.dtype == Dtype::kBFloat16;
    const int64_t panel_rows = t.blocks * kBlock;
    if (t.sums) {
        if (pairs)
            arena.take(t.query_pairs, panel_rows * t.padded / 2);
        else
            arena.take(t.query_panel, panel_rows * t.dim);
        arena.take(t.parts, t.chunks * t.rows);
        arena.take(t.part_mean, t.mean ? t.chunks * t.rows * t.padded : 0);
        arena.take(t.hidden, t.rows * t.most_hidden);
    } else {
        arena.take(t.query_rows, t.rows * t.padded);
        const int64_t packed = t.direct ? 0 : panel_rows;
        if (kernels.quads)
            arena.take(t.query_quads, packed * t.padded / 4);
        else
            arena.take(t.query_panel, packed * t.dim);
        for (float** row : {&t.inverse, &t.norm, &t.residual}) arena.take(*row, t.rows);
        arena.take(t.heaps, t.heap_sets * t.rows * t.topk);
        arena.take(t.bars, t.heap_sets * t.rows);
    }
}

void lay_out(Worker& w, const Task& t, size_t index, Arena& arena) {
    const int64_t packed = t.direct ? 0 : t.tile;
    arena.take(w.rows, (t.query_quads ? 1 : std::max<int64_t>(packed, 1)) * t.padded);
    if (t.query_pairs) {
        arena.take(w.pairs, packed * t.padded / 2);
        arena.take(w.row_pairs, packed / 2 * t.padded);
        arena.take(w.weight_pairs, kBlock * kTile / 2);
    } else if (t.query_panel) {
        arena.take(w.panel, packed * t.dim);
    } else {
        arena.take(w.quads, packed * t.padded / 4);
        arena.take(w.bytes, packed * t.padded);
        arena.take(w.slot_step, kTile);
        arena.take(w.slot_bias, kTile);
    }
    arena.take(w.scores, kGang * kBlock * kTile);
    arena.take(w.ids, kTile);
    if (t.sums) {
        arena.take(w.scratch, 2 * kTile);
        arena.take(w.words, kTile);
        arena.take(w.kept, kGang * kBlock * kTile / kSub);
        arena.take(w.added, kTile);
        arena.take(w.hidden, kTile / kSub);
        arena.take(w.columns, 4 * kBatches);
        arena.take(w.sums, t.group_blocks * kBlock);
        arena.take(w.mean, t.mean ? t.padded : 0);
    } else {
        const int64_t set_row = (t.heap_sets > 1 ? int64_t(index) : 0) * t.rows;
        w.heaps = t.heaps + set_row * t.topk;
        w.bars = t.bars + set_row;
    }
}

}  // namespace

Memory allocate(size_t bytes) {
    Memory memory(static_cast<char*>(std::aligned_alloc(Arena::kAlign, std::max<size_t>(bytes, 64))));
    if (!memory) throw std::bad_alloc();
    return memory;
}

Stage::Stage(const Task& problem, size_t threads) : task(problem), workers(threads) {
    split(task, threads);
}

void Stage::lay_out(const Kernels& kernels, Arena& arena) {
    cpu::lay_out(task, kernels, arena);
    for (size_t i = 0; i < workers.size(); ++i) cpu::lay_out(workers[i], task, i, arena);
}

}  // namespace psm::cpu
