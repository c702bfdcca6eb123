// What the driver (driver/) hands to the kernels of one instruction set. Plain data only:
// a template or inline function shared with translation units built for another instruction set
// could be merged by the linker into code that this machine cannot run.
#pragma once

#include "../../args.h"

namespace psm::cpu {

constexpr int kTile = 256;     // bank slots that are packed at once, at most
constexpr int kSub = 64;       // slots of one packed panel: four AVX-512 registers
constexpr int kBlock = 6;      // query rows per register block: 6 x 64 are 24 accumulators
constexpr int kPad = 32;       // rows are padded to this many elements: 32 bf16 pairs a register
constexpr int kGang = 4;       // row blocks that share the loads of a second product with gaps
constexpr int kLanes = 16;     // partial sums kept per row
constexpr int64_t kNoSlot = INT64_MAX;
constexpr int kBatches = kTile / 4;  // Philox counters per row and tile

// What a chunk of the bank gives a row; sums are in units of 2^shift.
struct Part {
    float sum, squares, count, shift, sq_shift;
};

// Either mines or sums: what is mined may have to be left out of the sums.
struct Task {
    const void *query, *bank;
    const float* unit;  // (B, padded), or null: queries to be rounded to the dtype, before `query`
    const float* s_pos;
    const float *affine, *rho, *slot_bias;
    int64_t rows, count, dim, padded;  // B, valid slots, D, D rounded up to kPad
    Dtype dtype;
    Selection selection;
    bool sums, mean;  // without sums: mining; without mean: no second product
    float temperature, scale, slope, b;  // tau, log2(e) / tau, -a log2(e), b
    int64_t topk;  // 0 where it sums
    Exclude exclude;
    uint64_t seed, offset;
    int64_t row_offset, col_offset;
    int64_t lead;  // tiles start at multiples of 16 global slots: empty slots before the first

    bool direct;   // mining multiplies rows of the bank where they lie, and packs nothing
    int64_t tile;  // slots of a tile, at most kTile, a multiple of kSub
    int64_t tiles, chunks, blocks, group_blocks, groups;

    // Packed queries, written by `prepare`: one of three forms. Blocks of kBlock rows, interleaved.
    float* query_panel;     // (blocks, D, kBlock)
    uint32_t* query_pairs;  // (blocks, padded / 2, kBlock) bf16 pairs
    uint32_t* query_quads;  // (blocks, padded / 4, kBlock) four bytes, biased by 128
    float* query_rows;      // (B, padded)
    float *inverse, *norm, *residual;  // (B,) 1 / step; norms of a query and its error, / step

    int64_t* hidden;      // (B, most_hidden) a row's slots that it must not sum, ascending, kNoSlot
    int64_t most_hidden;  // counts the kNoSlot that ends each list

    // Partial results of the chunks, merged in their order.
    Part* parts;      // (chunks, B)
    float* part_mean; // (chunks, B, padded)
    uint64_t* heaps;  // (heap_sets, B, topk) min-heaps; 0 is a missing entry
    float* bars;      // (heap_sets, B) what a similarity, divided by the step, must reach
    int64_t heap_sets;
};

// Sums of one row over a chunk, in units of 2^shift: partial sums in lanes.
struct alignas(64) RowSums {
    float sum[kLanes], squares[kLanes], count[kLanes];
    float shift, sq_shift;
    const int64_t* next;  // the first of its hidden slots from here on
};

// Buffers of one thread.
struct Worker {
    float* rows;          // (tile, padded) the tile in fp32, or what little mining needs of it
    float* panel;         // (tile / kSub, D, kSub)
    uint32_t* pairs;      // (tile / kSub, padded / 2, kSub) bf16 pairs along D
    uint32_t* row_pairs;  // (tile / 2, padded) bf16 pairs along slots
    uint32_t* quads;      // (tile / kSub, padded / 4, kSub) four signed bytes along D
    int8_t* bytes;        // (tile, padded)
    float* slot_step;     // (kTile,)
    int32_t* slot_bias;   // (kTile,) -128 * sum of the slot's bytes
    float* scores;        // (kGang * kBlock, kTile), then the weights of the second product
    float* scratch;       // (2, kTile)
    uint32_t* weight_pairs;  // (kBlock, kTile / 2)
    uint32_t* words;         // (kTile,)
    uint64_t* kept;          // (kGang * kBlock, kTile / kSub) a bit per slot
    float* added;            // (kTile,) by slot: rho, or tau times its bias
    int64_t* ids;            // (kTile,) of the slots
    uint64_t* hidden;        // (kTile / kSub,) a bit per slot that a row must not see
    uint64_t* columns;       // (4, kBatches) what Philox knows of a column before it sees a row
    RowSums* sums;           // (rows of a group,)
    float* mean;             // (padded,) of a row whose parts are merged
    uint64_t* heaps;         // (B, topk)
    float* bars;             // (B,)
};

// What a step makes before the pass: unit rows, padded with zeros.
struct UnitRows {
    const float *raw_query, *raw_key;  // (B, D) of any length
    float *query, *key;                // (B, padded)
    float *norms;                      // (B,) of the queries, 1 for a row of zeros
    float* s_pos;                      // (B,) similarity of each pair
};

// What the gradient of one row's loss is made of, by its unit query.
struct RowTerms {
    const float *query, *key, *mean;  // (padded,) unit rows; mean of the negatives
    const int64_t* slots;             // (mined,)
    int64_t mined;
    float to_key, to_mean;
    const float* to_mined;  // (mined,)
    float norm;             // of the query
};

struct Kernels {
    const char* name;
    bool quads, pairs;  // which packed forms the kernels read: bytes for mining, bf16 pairs
    void (*unit_rows)(const Task&, const UnitRows&, int64_t block);
    void (*prepare)(const Task&, int64_t block);
    void (*process)(const Task&, Worker&, int64_t item);  // item = group * chunks + chunk
    void (*merge_mean)(const Task&, int64_t row, const float* factors, float scale, float* mean);
    // `buffer` of both: (2, padded)
    void (*similarities)(const Task&, const float* query, const int64_t* slots, int64_t count,
                         float* buffer, float* similarity);
    void (*gradient)(const Task&, const RowTerms&, float* buffer, float* gradient);
    void (*enqueue_row)(const EnqueueArgs&, int64_t row, int64_t slot);
};

// Null where the build or the machine lacks the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace psm::cpu
