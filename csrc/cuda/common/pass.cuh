// What every kernel of a pass shares, on host and device: its arguments, how the work is cut, where
// partial results go.
#pragma once

#include <cmath>

#include "../../args.h"
#include "../../philox.h"
#include "primitives.cuh"

namespace psm::cuda {

enum class Work : int {
    kPass,      // sums over query . M
    kProducts,  // the same products with a null epilogue: the floor of a kernel
    kMine,      // cell maxima of query . M
    kInTurns,   // kPass of kBernoulli on sm_90a, whose warpgroups take turns
};

constexpr int kCellLog2 = 6;      // smallest cell, whose best similarity is kept for mining
constexpr int kMaxCells = 16384;  // per row: with more slots the cells grow, memory does not
constexpr float kLowest = -1e30f;  // a shift below every logit; finite, so that -inf - shift = -inf
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kKeepMax = 0.999f;  // cap of p

// One row's sums over one split. Logits are s / tau in base 2; sum = sum weight 2^(logit - shift),
// square = sum weight 2^(2 logit - square_shift).
struct RowSums {
    float shift, sum, square_shift, square, count;
};

// Which slots rows must not see, see hidden.cuh.
struct Hidden {
    uint32_t* flags;  // (B / 16, words) a bit per 64 slots, or null: every row sees every slot
    int* list;        // (B, listed) slots of each row
    int words, listed;
};

// Where a debug build says which barrier is waited for in vain (pipeline_sm90.cuh).
enum class Waits : int { kNone, kFull, kEmpty, kRowsFull, kRowsEmpty, kCopied };
struct alignas(16) Trapped {
    Waits what;
    int stage, block, warp;
};

// What the kernels of a pass get: the caller's struct, and how the work is done.
struct KernelArgs : PassArgs {
    bool aligned;         // rows and pointers are multiples of 16 bytes
    float scale;          // log2 e / tau
    float sharpness;      // sqrt(a log2 e)
    int row_blocks, splits;
    int cell_log2;        // slots of a cell, a power of two
    int cell_group = 1;   // or 4: four cells share each group of slots, see cell_slot
    int cells;            // room per row in `cell_max`
    Hidden hidden;
    RowSums* sums;     // (splits, B)
    float* means;      // (splits, B, D) sum weight 2^(logit - shift) bank
    float* cell_max;   // (B + 1, cells); what rows behind the batch give goes to the last
    Trapped* trapped;  // in memory of the host, or null: no debug build

    // In 32 bits, which kernels count in: 64 would cost the inner loops of sm_90 uniform registers.
    PSM_HD int rows() const { return int(batch); }
    PSM_HD int dim() const { return int(bank.dim); }
};

// The kernels walk global slots in aligned groups of 16, so that a thread owns the four elements of
// a Philox call wherever this shard of the bank starts: `lead` slots before slot 0 are not there.
PSM_HD int lead_slots(int64_t col_offset) { return int(((col_offset % 16) + 16) % 16); }
PSM_DEVICE int valid_slots(const KernelArgs& args) {
    const int64_t count = *args.bank.count;
    return int(count < 0 ? 0 : count > args.bank.slots ? args.bank.slots : count);
}
PSM_HD int group_slots(const KernelArgs& args) { return args.cell_group << args.cell_log2; }
PSM_HD int cell_count(int count, int lead, const KernelArgs& args) {
    return count > 0 ? ((count + lead - 1) / group_slots(args) + 1) * args.cell_group : 0;
}
// Cells of `slots` slots in whole tiles: those behind the last valid slot are written, too.
PSM_HD int room_for_cells(int64_t slots, int tile_slots, const KernelArgs& args) {
    const int group = group_slots(args), grain = group > tile_slots ? group : tile_slots;
    return int((slots + grain - 1) / grain * (grain / group)) * args.cell_group;
}
// Slot `i` of a cell, counted with `lead`. Cells follow each other, or each of the four threads of
// an accumulator's quad has its own: slots 2 c and 2 c + 1 of every 8 in the group.
PSM_HD int cell_slot(int cell, int i, const KernelArgs& args) {
    if (args.cell_group == 1) return (cell << args.cell_log2) + i;
    return cell / 4 * group_slots(args) + i / 2 * 8 + cell % 4 * 2 + i % 2;
}
PSM_HD int split_begin(int cells, int split, int splits) {
    return int(int64_t(cells) * split / splits);
}

// The tiles of one split: tile t covers slots [start(t), start(t + 1)), counted with `lead`.
struct Walk {
    int lead, tile_slots, first_tile, tiles;
    int end;          // of the valid slots
    int first_whole;  // this tile and those after it have all of their slots,
    unsigned wholes;  // so many of them
    PSM_DEVICE int start(int tile) const { return (first_tile + tile) * tile_slots; }
    PSM_DEVICE bool whole(int tile) const { return unsigned(tile - first_whole) < wholes; }
};
// Splits begin at whole tiles and whole cells.
PSM_DEVICE Walk walk_of(const KernelArgs& args, int tile_slots, int split) {
    const int lead = lead_slots(args.options.col_offset), count = valid_slots(args);
    const int group = group_slots(args), end = count + lead;
    const int grain = group > tile_slots ? group : tile_slots;
    const int grains = count > 0 ? (end - 1) / grain + 1 : 0, grain_tiles = grain / tile_slots;
    const int tiles = count > 0 ? (end - 1) / tile_slots + 1 : 0;
    const int first = split_begin(grains, split, args.splits) * grain_tiles;
    const int last = split_begin(grains, split + 1, args.splits) * grain_tiles;
    const int first_whole = first == 0 && lead > 0, wholes = end / tile_slots - first - first_whole;
    return {lead, tile_slots, first, (last < tiles ? last : tiles) - first, end,
            first_whole, unsigned(wholes > 0 ? wholes : 0)};
}

template <class T>
struct Type {
    using type = T;
};
template <class Visit>
auto visit_dtype(Dtype dtype, Visit visit) {
    if (dtype == Dtype::kFloat32) return visit(Type<float>{});
    if (dtype == Dtype::kBFloat16) return visit(Type<BFloat16>{});
    return visit(Type<Float16>{});
}

}  // namespace psm::cuda
