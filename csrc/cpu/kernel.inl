// The bank pass over one chunk of the bank, written once for every instruction set. Included by
// isa_*.cpp after simd_*.h, inside a namespace of its own. Reads downwards: packing, products,
// mining, epilogue, and `process`, which runs them tile by tile.

// ---- prepare: queries and keys ----

template <Dtype kDtype>
INLINE V load_as(const void* base, int64_t i) {
    if constexpr (kDtype == Dtype::kFloat32) return load((const float*)base + i);
    if constexpr (kDtype == Dtype::kBFloat16) return load_bf16((const uint16_t*)base + i);
    if constexpr (kDtype == Dtype::kFloat16) return load_fp16((const uint16_t*)base + i);
}

INLINE float element_as_float(const void* base, int64_t i, Dtype dtype) {
    if (dtype == Dtype::kFloat32) return ((const float*)base)[i];
    const uint16_t half = ((const uint16_t*)base)[i];
    return dtype == Dtype::kFloat16 ? half_to_float(half) : bits_to_float(uint32_t(half) << 16);
}

template <Dtype kDtype>
void convert_row(const void* src, int64_t first, int64_t dim, int64_t padded, float* dst) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(dst + d, load_as<kDtype>(src, first + d));
    for (; d < dim; ++d) dst[d] = element_as_float(src, first + d, kDtype);
    for (; d < padded; ++d) dst[d] = 0.0f;
}

void convert(const Task& t, const void* src, int64_t row, float* dst) {
    const int64_t first = row * t.dim;
    if (t.dtype == Dtype::kFloat32) convert_row<Dtype::kFloat32>(src, first, t.dim, t.padded, dst);
    if (t.dtype == Dtype::kBFloat16)
        convert_row<Dtype::kBFloat16>(src, first, t.dim, t.padded, dst);
    if (t.dtype == Dtype::kFloat16) convert_row<Dtype::kFloat16>(src, first, t.dim, t.padded, dst);
}

// One row as signed bytes times `step`, with what the bound on the error of a product needs.
// A row that holds NaN or inf has residual inf: no bound.
struct Quantized {
    float step, norm, residual;  // norm of the row, norm of (row - step * bytes)
    int32_t total;               // sum of the bytes
};

#if PSM_QUADS
Quantized quantize_row(const float* row, int64_t padded, int8_t* bytes) {
    V top = set1(0.0f), norm = set1(0.0f), residual = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load(row + d);
        top = max(top, abs(x));
        norm = fma(x, x, norm);
    }
    Quantized q{largest(top) / 127.0f, square_root(sum(norm)), kInfinity, 0};
    if (!(q.norm < 1e18f && q.norm > 1e-18f)) {  // squares would overflow, vanish or be NaN
        for (int64_t d = 0; d < padded; ++d) bytes[d] = 0;
        const bool zero = largest(top) == 0.0f && q.norm == 0.0f;
        return zero ? Quantized{1.0f, 0.0f, 0.0f, 0} : Quantized{1.0f, q.norm, kInfinity, 0};
    }
    const V inverse = set1(1.0f / q.step), step = set1(q.step);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load(row + d);
        const V error = sub(x, mul(step, quantize(mul(x, inverse), bytes + d, q.total)));
        residual = fma(error, error, residual);
    }
    q.residual = square_root(sum(residual));
    return q;
}
#endif

INLINE float norm_of(const float* row, int64_t padded) {
    V norm = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kWidth) norm = fma(load(row + d), load(row + d), norm);
    return square_root(sum(norm));
}

void set_bound(const Task& t, int64_t i, float inverse, float norm, float residual) {
    const bool finite = norm < kInfinity;
    const float slack = 1.0001f * inverse;  // the norms are rounded as well
    t.key_inverse[i] = inverse;
    t.key_norm[i] = finite ? larger(slack * norm, 1e-30f) : 0.0f;  // not 0: 0 * inf is NaN
    t.key_residual[i] = finite ? larger(slack * residual, 1e-30f) : 0.0f;
    for (int64_t set = 0; set < t.heap_sets; ++set)  // NaN or inf in a key: it finds nothing
        t.bars[set * t.rows + i] = finite ? -kInfinity : kInfinity;
}

uint32_t bf16_bits(float x) { return float_to_bits(x) >> 16; }  // x is a bf16 already

void prepare(const Task& t) {
    float* row = (float*)__builtin_alloca(size_t(t.padded) * sizeof(float));
    for (int64_t i = 0; t.sums && i < t.rows; ++i) {
        convert(t, t.query, i, row);
        const int64_t block = i / kBlock, r = i % kBlock;
        if (t.query_pairs) {
            uint32_t* panel = t.query_pairs + block * (t.padded / 2) * kBlock + r;
            for (int64_t d = 0; d < t.padded / 2; ++d)
                panel[d * kBlock] = bf16_bits(row[2 * d]) | bf16_bits(row[2 * d + 1]) << 16;
        } else {
            float* panel = t.query_panel + block * t.dim * kBlock + r;
            for (int64_t d = 0; d < t.dim; ++d) panel[d * kBlock] = row[d];
        }
    }
    for (int64_t i = 0; t.topk && i < t.rows; ++i) {
        float* key = t.key_rows + i * t.padded;
        convert(t, t.key, i, key);
        const int64_t block = i / kBlock, r = i % kBlock;
#if PSM_QUADS
        int8_t* bytes = (int8_t*)row;
        const Quantized q = quantize_row(key, t.padded, bytes);
        uint32_t* panel = t.key_quads + block * (t.padded / 4) * kBlock + r;
        for (int64_t d = 0; d < t.padded / 4; ++d) {
            uint32_t quad;
            __builtin_memcpy(&quad, bytes + 4 * d, 4);
            panel[d * kBlock] = quad ^ 0x80808080u;  // byte + 128 as an unsigned byte
        }
        set_bound(t, i, 1.0f / q.step, q.norm, q.residual);
#else
        float* panel = t.key_panel + block * t.dim * kBlock + r;
        for (int64_t d = 0; d < t.dim; ++d) panel[d * kBlock] = key[d];
        set_bound(t, i, 1.0f, norm_of(key, t.padded), 0.0f);
#endif
    }
}

// ---- packing of one tile ----

struct Tile {
    int64_t slot;         // bank slot of the tile's slot 0, may be negative in the first tile
    int low, high;        // valid slots of the tile
    int width;            // `high` rounded up to whole panels
    float norm, residual; // the largest of its slots
};

// (slots, columns) -> (slots / kSub, columns, kSub)
void transpose_panels(const uint32_t* src, int64_t ld, int64_t columns, int width, uint32_t* dst) {
    for (int64_t c = 0; c < columns; c += 4)
        for (int j = 0; j < width; j += kTransposed)
            transpose(src + j * ld + c, ld,
                      dst + (j / kSub) * columns * kSub + c * kSub + j % kSub, kSub);
}

void pack_philox_columns(const Task& t, const Tile& tile, uint64_t* columns);

Tile pack_tile(const Task& t, Worker& w, int64_t index) {
    Tile tile{};
    tile.slot = index * t.tile - t.lead;
    tile.low = tile.slot < 0 ? int(-tile.slot) : 0;
    tile.high = int(smaller(t.count - tile.slot, t.tile));
    tile.width = (tile.high + kSub - 1) / kSub * kSub;
    const int64_t ld = t.padded;
    for (int j = 0; j < tile.width; ++j) {
        float* row = w.rows + j * ld;
        if (j < tile.low || j >= tile.high)
            __builtin_memset(row, 0, size_t(ld) * sizeof(float));
        else
            convert(t, t.bank, tile.slot + j, row);
    }
    if (t.topk) {
        for (int j = 0; j < tile.width; ++j) {
#if PSM_QUADS
            const Quantized q = quantize_row(w.rows + j * ld, ld, w.bytes + j * ld);
            w.slot_step[j] = q.step;
            w.slot_bias[j] = -128 * q.total;
            tile.residual = larger(tile.residual, q.residual);
            tile.norm = larger(tile.norm, q.norm);
#else
            tile.norm = larger(tile.norm, norm_of(w.rows + j * ld, ld));
#endif
        }
#if PSM_QUADS
        transpose_panels((const uint32_t*)w.bytes, ld / 4, ld / 4, tile.width, w.quads);
#endif
    }
    if (t.query_pairs) {
#if PSM_PAIRS
        uint32_t* pairs = w.row_pairs;  // first as pairs along D, then as pairs along slots
        for (int j = 0; j < tile.width; ++j)
            for (int64_t d = 0; d < ld; d += 2 * kWidth)
                store_pairs(pairs + (j * ld + d) / 2, load(w.rows + j * ld + d),
                            load(w.rows + j * ld + d + kWidth));
        transpose_panels(pairs, ld / 2, ld / 2, tile.width, w.pairs);
        for (int j = 0; j < tile.width; j += 2)
            for (int64_t d = 0; d < ld; d += kWidth)
                store_interleaved(pairs + j / 2 * ld + d, load(w.rows + j * ld + d),
                                  load(w.rows + (j + 1) * ld + d));
#endif
    } else if (t.sums || !PSM_QUADS) {
        // The panel holds D columns, not `padded`: the last four of a row may be partly padding.
        const int64_t whole = t.dim / 4 * 4;
        const auto* rows = (const uint32_t*)w.rows;
        for (int p = 0; p < tile.width / kSub; ++p) {
            uint32_t* panel = (uint32_t*)w.panel + p * t.dim * kSub;
            for (int64_t c = 0; c < whole; c += 4)
                for (int j = 0; j < kSub; j += kTransposed)
                    transpose(rows + (p * kSub + j) * ld + c, ld, panel + c * kSub + j, kSub);
            for (int64_t c = whole; c < t.dim; ++c)
                for (int j = 0; j < kSub; ++j)
                    panel[c * kSub + j] = rows[(p * kSub + j) * ld + c];
        }
    }
    if (t.sums && t.selection == Selection::kBernoulli) pack_philox_columns(t, tile, w.columns);
    if (t.sums && t.selection == Selection::kAffine)
        for (int j = 0; j < tile.width; ++j)
            w.rho[j] = j < tile.low || j >= tile.high ? 0.0f : t.rho[tile.slot + j];
    return tile;
}

// ---- products ----

// scores (kRows, kTile) = query panel x one panel of the bank
template <int kRows>
void product(const float* query, const float* panel, int64_t dim, float* scores) {
    for (int first = 0; first < kSub; first += kPanels * kWidth) {
        V acc[kRows][kPanels];
        for (int r = 0; r < kRows; ++r)
            for (int n = 0; n < kPanels; ++n) acc[r][n] = set1(0.0f);
        const float *q = query, *m = panel + first;
        for (int64_t d = 0; d < dim; ++d, q += kBlock, m += kSub) {
            V bank[kPanels];
            for (int n = 0; n < kPanels; ++n) bank[n] = load(m + n * kWidth);
            for (int r = 0; r < kRows; ++r) {
                const V x = set1(q[r]);
                for (int n = 0; n < kPanels; ++n) acc[r][n] = fma(x, bank[n], acc[r][n]);
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int n = 0; n < kPanels; ++n)
                store(scores + r * kTile + first + n * kWidth, acc[r][n]);
    }
}

// mean (kRows, ld) += weights (kRows, kTile) x rows (slots, ld), for kColumns vectors of columns
template <int kRows, int kColumns>
void accumulate(const float* weights, const float* rows, int slots, int64_t ld, float* mean) {
    V acc[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kColumns; ++n) acc[r][n] = load(mean + r * ld + n * kWidth);
    for (int j = 0; j < slots; ++j, rows += ld) {
        V bank[kColumns];
        for (int n = 0; n < kColumns; ++n) bank[n] = load(rows + n * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const V x = set1(weights[r * kTile + j]);
            for (int n = 0; n < kColumns; ++n) acc[r][n] = fma(x, bank[n], acc[r][n]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kColumns; ++n) store(mean + r * ld + n * kWidth, acc[r][n]);
}

#if PSM_PAIRS
template <int kRows>
void product_pairs(const uint32_t* query, const uint32_t* panel, int64_t pairs, float* scores) {
    V acc[kRows][kPanels];
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kPanels; ++n) acc[r][n] = set1(0.0f);
    for (int64_t d = 0; d < pairs; ++d, query += kBlock, panel += kSub) {
        I bank[kPanels];
        for (int n = 0; n < kPanels; ++n) bank[n] = load_i(panel + n * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const I x = set1_i(query[r]);
            for (int n = 0; n < kPanels; ++n) acc[r][n] = dot_pairs(acc[r][n], x, bank[n]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kPanels; ++n) store(scores + r * kTile + n * kWidth, acc[r][n]);
}

template <int kRows, int kColumns>
void accumulate_pairs(const uint32_t* weights, const uint32_t* rows, int slots, int64_t ld,
                      float* mean) {
    V acc[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kColumns; ++n) acc[r][n] = load(mean + r * ld + n * kWidth);
    for (int j = 0; j < (slots + 1) / 2; ++j, rows += ld) {
        I bank[kColumns];
        for (int n = 0; n < kColumns; ++n) bank[n] = load_i(rows + n * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const I x = set1_i(weights[r * (kTile / 2) + j]);
            for (int n = 0; n < kColumns; ++n) acc[r][n] = dot_pairs(acc[r][n], x, bank[n]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kColumns; ++n) store(mean + r * ld + n * kWidth, acc[r][n]);
}
#endif

template <int kRows, int kColumns>
INLINE void accumulate_at(const Worker& w, const Tile& tile, int64_t d, int64_t ld,
                          [[maybe_unused]] bool pairs, float* mean) {
#if PSM_PAIRS
    if (pairs) {
        accumulate_pairs<kRows, kColumns>(w.weight_pairs, w.row_pairs + d, tile.high, ld, mean + d);
        return;
    }
#endif
    accumulate<kRows, kColumns>(w.scores, w.rows + d, tile.high, ld, mean + d);
}

template <int kRows>
void accumulate_rows(const Task& t, const Worker& w, const Tile& tile, float* mean) {
    const int64_t ld = t.padded;
    const bool pairs = t.query_pairs != nullptr;
    int64_t d = 0;
    for (; d + kPanels * kWidth <= ld; d += kPanels * kWidth)
        accumulate_at<kRows, kPanels>(w, tile, d, ld, pairs, mean);
    constexpr int kHalf = kPanels / 2;  // padding leaves half a block or nothing
    for (; d < ld; d += kHalf * kWidth) accumulate_at<kRows, kHalf>(w, tile, d, ld, pairs, mean);
}

// ---- mining ----
//
// A cheap product with a proven bound on its error finds the slots that may enter the top-k of a
// row; only those get an exact fp32 product. What is dropped is strictly below the k-th best found
// so far, so the result is the exact top-k of exact similarities, whatever the order of tiles.

// Entries are (similarity, smaller slot first) as one integer that sorts; 0 is a missing entry.
INLINE uint64_t heap_entry(float similarity, int64_t slot) {
    const uint32_t bits = float_to_bits(similarity + 0.0f);  // -0 ties with +0
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(ordered) << 32 | (0xFFFFFFFFu - uint32_t(slot));
}
INLINE float heap_similarity(uint64_t entry) {
    if (entry == 0) return -kInfinity;
    const uint32_t ordered = uint32_t(entry >> 32);
    return bits_to_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

void heap_replace_root(uint64_t* heap, int64_t size, uint64_t entry) {
    int64_t i = 0;
    for (int64_t child = 1; child < size; child = 2 * i + 1) {
        if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
        if (entry <= heap[child]) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = entry;
}

// Bit j of masks[r]: slot j of the panel may have a similarity of at least floor[r].
template <int kRows>
void screen(const Task& t, const Worker& w, int64_t block, int panel, const float* floor,
            uint64_t* masks) {
#if PSM_QUADS
    I acc[kRows][kPanels];
    for (int n = 0; n < kPanels; ++n)
        for (int r = 0; r < kRows; ++r)
            acc[r][n] = load_i(w.slot_bias + panel * kSub + n * kWidth);
    const int64_t quads = t.padded / 4;
    const uint32_t* key = t.key_quads + block * quads * kBlock;
    const uint32_t* m = w.quads + panel * quads * kSub;
    for (int64_t d = 0; d < quads; ++d, key += kBlock, m += kSub) {
        I bank[kPanels];
        for (int n = 0; n < kPanels; ++n) bank[n] = load_i(m + n * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const I x = set1_i(key[r]);
            for (int n = 0; n < kPanels; ++n) acc[r][n] = dot_bytes(acc[r][n], x, bank[n]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kPanels; ++n)
            store(w.scores + r * kTile + n * kWidth,
                  mul(to_float(acc[r][n]), load(w.slot_step + panel * kSub + n * kWidth)));
#else
    product<kRows>(t.key_panel + block * t.dim * kBlock, w.panel + panel * t.dim * kSub, t.dim,
                   w.scores);
#endif
    for (int r = 0; r < kRows; ++r) {
        masks[r] = 0;
        for (int n = 0; n < kSub; n += kWidth)
            masks[r] |= at_least(load(w.scores + r * kTile + n), set1(floor[r])) << n;
    }
}

INLINE float dot(const float* x, const float* y, int64_t padded) {
    V acc = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kWidth) acc = fma(load(x + d), load(y + d), acc);
    return sum(acc);
}

template <int kRows>
void mine(const Task& t, const Worker& w, const Tile& tile, int64_t block) {
    const int64_t first_row = block * kBlock;
    // fp32 rounding of the exact product and of the steps below: D + 16 roundings, doubled.
    const float rounding = float(t.padded + 16) * 1.2e-7f;
    float from_norm = tile.residual + rounding * tile.norm;
    float from_residual = tile.norm + tile.residual;
    if (!(from_norm < kInfinity)) from_norm = from_residual = kInfinity;  // no bound: take all
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        float floor[kRows];
        uint64_t masks[kRows];
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = first_row + r;
            // |k.m - k'.m'| <= |k| |m - m'| + |k - k'| |m'|
            const float error = t.key_norm[i] * from_norm + t.key_residual[i] * from_residual;
            floor[r] = w.bars[i] - error;
        }
        screen<kRows>(t, w, block, panel, floor, masks);
        const int low = tile.low - panel * kSub, high = tile.high - panel * kSub;
        uint64_t valid = high >= kSub ? ~0ull : high <= 0 ? 0 : (1ull << high) - 1;
        if (low > 0) valid &= low >= kSub ? 0 : ~0ull << low;
        for (int r = 0; r < kRows; ++r) {
            uint64_t* heap = w.heaps + (first_row + r) * t.topk;
            const float* key = t.key_rows + (first_row + r) * t.padded;
            for (uint64_t mask = masks[r] & valid; mask; mask &= mask - 1) {
                const int j = panel * kSub + __builtin_ctzll(mask);
                const float similarity = dot(key, w.rows + j * t.padded, t.padded);
                if (similarity != similarity) continue;
                const uint64_t entry = heap_entry(similarity, tile.slot + j);
                if (entry <= heap[0]) continue;
                heap_replace_root(heap, t.topk, entry);
                w.bars[first_row + r] = heap_similarity(heap[0]) * t.key_inverse[first_row + r];
            }
        }
    }
}

// ---- noise ----
//
// The first three of the ten Philox rounds depend on the row and on the column almost separately:
// the column's share is computed once per tile, which saves 13 of 60 operations per counter.

void pack_philox_columns(const Task& t, const Tile& tile, uint64_t* columns) {
    const uint32_t key0 = uint32_t(t.seed), key1 = uint32_t(t.seed >> 32);
    const uint32_t offset0 = uint32_t(t.offset), offset1 = uint32_t(t.offset >> 32);
    const uint32_t low1 = kPhiloxM1 * offset0;
    const uint32_t first = uint32_t(4 * ((tile.slot + t.col_offset) / 16));
    for (int i = 0; i < kBatches; ++i) {
        const uint64_t a = uint64_t(kPhiloxM0) * (first + uint32_t(i));
        const uint64_t b = uint64_t(kPhiloxM1) * (uint32_t(a >> 32) ^ offset1 ^ key1);
        const uint32_t c0 = uint32_t(b >> 32) ^ low1 ^ (key0 + kPhiloxW0);
        const uint64_t c = uint64_t(kPhiloxM0) * c0;
        columns[i] = uint32_t(a);
        columns[kBatches + i] = uint32_t(b) ^ (key0 + 2 * kPhiloxW0);
        columns[2 * kBatches + i] = uint32_t(c >> 32) ^ (key1 + 2 * kPhiloxW1);
        columns[3 * kBatches + i] = uint32_t(c);
    }
}

void philox_row(const Task& t, const Tile& tile, const uint64_t* columns, int64_t row,
                uint32_t* words) {
    const uint32_t key0 = uint32_t(t.seed), key1 = uint32_t(t.seed >> 32);
    const uint64_t a = uint64_t(kPhiloxM1) * uint32_t(t.offset);
    const uint64_t b = uint64_t(kPhiloxM0) *
                       (uint32_t(a >> 32) ^ uint32_t(row + t.row_offset) ^ key0);
    const W row_high = set1_w(uint32_t(b >> 32) ^ (key1 + kPhiloxW1)), row_low = set1_w(uint32_t(b));
    const W m0 = set1_w(kPhiloxM0), m1 = set1_w(kPhiloxM1);
    constexpr int kStep = kWidth / 2;      // counters per vector
    constexpr int kFlight = 4;             // vectors in flight hide the latency of the products
    for (int i = 0; 4 * i < tile.width; i += kFlight * kStep) {
        W c0[kFlight], c1[kFlight], c2[kFlight], c3[kFlight];
        for (int f = 0; f < kFlight; ++f) {  // round 3 of 10
            const uint64_t* column = columns + i + f * kStep;
            const W p1 = mul_w(xor_w(load_w(column), row_high), m1);
            c0[f] = xor_w(high_w(p1), load_w(column + kBatches));
            c1[f] = p1;
            c2[f] = xor_w(load_w(column + 2 * kBatches), row_low);
            c3[f] = load_w(column + 3 * kBatches);
        }
        for (int round = 3; round < kPhiloxRounds; ++round) {
            const W k0 = set1_w(key0 + uint32_t(round) * kPhiloxW0);
            const W k1 = set1_w(key1 + uint32_t(round) * kPhiloxW1);
            for (int f = 0; f < kFlight; ++f) {
                const W p0 = mul_w(c0[f], m0), p1 = mul_w(c2[f], m1);
                c0[f] = xor3_w(high_w(p1), c1[f], k0);
                c1[f] = p1;
                c2[f] = xor3_w(high_w(p0), c3[f], k1);
                c3[f] = p0;
            }
        }
        for (int f = 0; f < kFlight; ++f)
            store_words(words, i + f * kStep, join_w(c0[f], c1[f]), join_w(c2[f], c3[f]));
    }
    for (int j = 0; j < tile.low; ++j) words[j] = 0xFFFFFFFFu;  // above every threshold
    for (int j = tile.high; j < tile.width; ++j) words[j] = 0xFFFFFFFFu;
}

// ---- epilogue: scores of one row become weights, sums and counts ----
//
// Weights are 2^(x - shift). The shift is the x of some kept slot, moved up when another exceeds
// it by kHeadroom: the largest weight stays in [1, 2^40] and its square below 2^80, so neither
// the sums over any bank overflow nor does anything that matters underflow.

constexpr float kHeadroom = 40.0f;

// 2^(t + kLog2Scale) for t <= 127; 0 below t = -127; NaN stays NaN. Relative error 1.5e-7.
// Adding 1.5 * 2^23 + 127 leaves the biased exponent of 2^round(t) in the low bits: additions and
// a shift, where scalef and reduce of AVX-512 cost 2 and 3 cycles of the multipliers on Zen 4.
template <int kLog2Scale>
INLINE V exp2(V t) {
    t = max(set1(-127.0f), t);
    const V magic = set1(12582912.0f + 127.0f), biased = add(t, magic);
    const V f = sub(t, sub(biased, magic));
    V p = set1(kExp2[5] * (1ull << kLog2Scale));
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i] * (1ull << kLog2Scale)));
    return mul(p, shift_to_exponent(biased));
}

struct RowSums {
    float *sum, *squares, *count;  // kLanes each
    float *shift, *sq_shift;
    float* mean;  // (padded,)
};

INLINE void scale_lanes(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, mul(load(x + i), set1(factor)));
}

NOINLINE void move_shift(const Task& t, const RowSums& row, V top) {
    const float shift = largest(top), factor = power_of_two(*row.shift - shift);
    scale_lanes(row.sum, kLanes, factor);
    if (t.mean) scale_lanes(row.mean, t.padded, factor);
    if (t.selection != Selection::kExpected) scale_lanes(row.squares, kLanes, factor * factor);
    *row.shift = shift;
}

template <Selection kSelection>
void weigh(const Task& t, const Worker& w, const Tile& tile, int64_t i, const RowSums& row,
           float* scores) {
    const V scale = set1(t.scale), slope = set1(t.slope);
    V top = set1(-kInfinity);
    int kept = tile.high - tile.low;
    if constexpr (kSelection == Selection::kBernoulli) {
        philox_row(t, tile, w.columns, i, w.words);
        const V center = set1(t.s_pos[i] + t.b), cap = set1(0.999f * 4294967296.0f);
        kept = 0;
        for (int j = 0; j < tile.width; j += kWidth) {
            const V s = load(scores + j), x = sub(s, center);
            const V threshold = min(exp2<32>(mul(mul(x, x), slope)), cap);
            const V kept_s = keep(s, w.words + j, threshold, kept);
            store(scores + j, kept_s);
            top = max(top, kept_s);
        }
        if (kept == 0) {
            __builtin_memset(scores, 0, size_t(tile.width) * sizeof(float));
            return;
        }
    } else {
        for (int j = 0; j < tile.low; ++j) scores[j] = -kInfinity;
        for (int j = tile.high; j < tile.width; ++j) scores[j] = -kInfinity;
        for (int j = 0; j < tile.width; j += kWidth) top = max(top, load(scores + j));
    }
    row.count[0] += float(kept);
    top = mul(top, scale);
    if (any_above(top, set1(*row.shift + kHeadroom))) move_shift(t, row, top);
    const V shift = set1(-*row.shift);
    V total = set1(0.0f), squares = set1(0.0f);
    for (int j = 0; j < tile.width; j += kWidth) {
        const V e = exp2<0>(fma(load(scores + j), scale, shift));
        store(scores + j, e);
        total = add(total, e);
        squares = fma(e, e, squares);
    }
    store(row.sum, add(load(row.sum), total));
    store(row.squares, add(load(row.squares), squares));
}

// Weights p exp(s/tau): p may be tiny where exp(s/tau) is large, so that sum p exp(2s/tau) has a
// shift of its own.
template <>
void weigh<Selection::kExpected>(const Task& t, const Worker& w, const Tile& tile, int64_t i,
                                 const RowSums& row, float* scores) {
    const V scale = set1(t.scale), slope = set1(t.slope), cap = set1(kLog2Cap);
    const V center = set1(t.s_pos[i] + t.b);
    float *squares = w.scratch, *chance = w.scratch + kTile;
    for (int j = 0; j < tile.width; j += kWidth) {
        const V s = load(scores + j), x = sub(s, center);
        const V p = min(mul(mul(x, x), slope), cap), weight = fma(s, scale, p);
        store(chance + j, p);
        store(scores + j, weight);
        store(squares + j, fma(s, scale, weight));
    }
    for (int j = 0; j < tile.width; ++j)
        if (j < tile.low || j >= tile.high) scores[j] = squares[j] = chance[j] = -kInfinity;
    V top = set1(-kInfinity), sq_top = top;
    for (int j = 0; j < tile.width; j += kWidth) {
        top = max(top, load(scores + j));
        sq_top = max(sq_top, load(squares + j));
    }
    if (any_above(top, set1(*row.shift + kHeadroom))) move_shift(t, row, top);
    if (any_above(sq_top, set1(*row.sq_shift + kHeadroom))) {
        const float shift = largest(sq_top);
        scale_lanes(row.squares, kLanes, power_of_two(*row.sq_shift - shift));
        *row.sq_shift = shift;
    }
    if (*row.shift == -kInfinity) {  // every chance underflowed
        __builtin_memset(scores, 0, size_t(tile.width) * sizeof(float));
        return;
    }
    const V shift = set1(-*row.shift), sq_shift = set1(-*row.sq_shift);
    for (int j = 0; j < tile.width; j += kWidth) {
        const V e = exp2<0>(add(load(scores + j), shift));
        store(scores + j, e);
        store(row.sum, add(load(row.sum), e));
        store(row.squares, add(load(row.squares), exp2<0>(add(load(squares + j), sq_shift))));
        store(row.count, add(load(row.count), exp2<0>(load(chance + j))));
    }
}

// Weights that are affine in s and e = exp((s - top)/tau). The row's top is given, so it is the
// shift from the first tile on.
template <>
void weigh<Selection::kAffine>(const Task& t, const Worker& w, const Tile& tile, int64_t i,
                               const RowSums& row, float* scores) {
    const float* affine = t.affine + i;
    const V alpha = set1(affine[0]), beta = set1(affine[t.rows]), gamma = set1(affine[2 * t.rows]);
    const V scale = set1(t.scale), cap = set1(affine[4 * t.rows]), zero = set1(0.0f);
    *row.shift = affine[3 * t.rows] * t.scale;
    const V shift = set1(-*row.shift);
    float* weights = w.scratch;
    for (int j = 0; j < tile.width; j += kWidth) {
        const V s = load(scores + j), e = exp2<0>(fma(s, scale, shift));
        const V line = fma(beta, s, add(alpha, load(w.rho + j)));
        const V weight = max(zero, fma(gamma, min(cap, e), line));  // NaN stays NaN
        store(weights + j, weight);
        store(scores + j, mul(weight, e));
    }
    for (int j = 0; j < tile.width; ++j)
        if (j < tile.low || j >= tile.high) scores[j] = weights[j] = 0.0f;
    V total = load(row.sum), count = load(row.count);
    for (int j = 0; j < tile.width; j += kWidth) {
        total = add(total, load(scores + j));
        count = add(count, load(weights + j));
    }
    store(row.sum, total);
    store(row.count, count);
}

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

// ---- one item: one group of rows over one chunk of the bank ----

template <int kRows>
void process_block(const Task& t, Worker& w, const Tile& tile, int64_t block, int64_t first_row,
                   float* mean) {
    if (t.topk) mine<kRows>(t, w, tile, block);
    if (!t.sums) return;
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        float* scores = w.scores + panel * kSub;
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
                          w.shift + local, w.sq_shift + local, mean + r * t.padded};
        float* scores = w.scores + r * kTile;
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
    if (t.mean) accumulate_rows<kRows>(t, w, tile, mean);
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
        for (int64_t r = 0; r < rows; ++r) w.shift[r] = w.sq_shift[r] = -kInfinity;
    }
    const int64_t last_tile = (chunk + 1) * t.tiles / t.chunks;
    for (int64_t index = chunk * t.tiles / t.chunks; index < last_tile; ++index) {
        const Tile tile = pack_tile(t, w, index);
        const Upcoming next = upcoming(t, index + 1 < last_tile ? tile.slot + t.tile : t.count,
                                       last_block - first_block);
        for (int64_t block = first_block; block < last_block; ++block) {
            prefetch(next, block - first_block);
            const int64_t left = t.rows - block * kBlock;
            kProcess[smaller(left, kBlock) - 1](t, w, tile, block, first_row, mean);
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
