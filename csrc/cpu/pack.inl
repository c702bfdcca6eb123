// Queries, keys and bank tiles in the forms that the products read. Part of kernel.inl.

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
};

#if PSM_QUADS
Quantized quantize_row(const float* row, int64_t padded, int8_t* bytes) {
    V top = set1(0.0f), norm = set1(0.0f), residual = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load(row + d);
        top = max(top, abs(x));
        norm = fma(x, x, norm);
    }
    Quantized q{largest(top) / 127.0f, square_root(sum(norm)), kInfinity};
    if (!(q.norm < 1e18f && q.norm > 1e-18f)) {  // squares would overflow, vanish or be NaN
        for (int64_t d = 0; d < padded; ++d) bytes[d] = 0;
        const bool zero = largest(top) == 0.0f && q.norm == 0.0f;
        return zero ? Quantized{1.0f, 0.0f, 0.0f} : Quantized{1.0f, q.norm, kInfinity};
    }
    const V inverse = set1(1.0f / q.step), step = set1(q.step);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load(row + d);
        const V error = sub(x, mul(step, quantize(mul(x, inverse), bytes + d)));
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

// One tile of the bank.
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
            tile.residual = larger(tile.residual, q.residual);
            tile.norm = larger(tile.norm, q.norm);
#else
            tile.norm = larger(tile.norm, norm_of(w.rows + j * ld, ld));
#endif
        }
#if PSM_QUADS
        transpose_panels((const uint32_t*)w.bytes, ld / 4, ld / 4, tile.width, w.quads);
        for (int j = 0; j < tile.width; j += kWidth) {
            const uint32_t* quads = w.quads + j / kSub * (ld / 4) * kSub + j % kSub;
            I biased{};
            for (int64_t d = 0; d < ld / 4; ++d)
                biased = dot_bytes(biased, set1_i(0x80808080u), load_i(quads + d * kSub));
            store_i(w.slot_bias + j, -biased);
        }
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
    if (t.sums && t.selection == Selection::kAffine)
        for (int j = 0; j < tile.width; ++j)
            w.rho[j] = j < tile.low || j >= tile.high ? 0.0f : t.rho[tile.slot + j];
    return tile;
}
