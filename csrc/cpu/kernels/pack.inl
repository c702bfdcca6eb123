// Bank tiles in the forms that the products read. Part of kernel.inl.

// One tile of the bank.
struct Tile {
    int64_t slot;         // bank slot of the tile's slot 0, may be negative in the first tile
    int low, high;        // valid slots of the tile
    int width;            // `high` rounded up to whole panels
    const float* rows;    // (width, padded) in fp32, zeros where there is no slot
    float norm, residual; // the largest of its slots
    uint64_t seen[kTile / kSub];  // a bit per slot that rows may see: valid and not empty
    bool whole;                   // they may see every slot
};

// (slots, columns) -> (slots / kSub, columns, kSub)
void transpose_panels(const uint32_t* src, int64_t ld, int64_t columns, int width, uint32_t* dst) {
    for (int64_t c = 0; c < columns; c += 4)
        for (int j = 0; j < width; j += kTransposed)
            transpose(src + j * ld + c, ld,
                      dst + (j / kSub) * columns * kSub + c * kSub + j % kSub, kSub);
}

// Which slots rows may see, and the ids to compare theirs with.
void mark_slots(const Task& t, Worker& w, Tile& tile) {
    uint64_t unseen = 0;
    for (int j = 0; j < tile.width; j += kSub) {
        const int low = tile.low - j, high = tile.high - j;
        uint64_t seen = high >= kSub ? ~0ull : (1ull << high) - 1;
        if (low > 0) seen &= low >= kSub ? 0 : ~0ull << low;
        if (t.exclude.bank_ids)
            for (int n = 0; n < kSub; ++n) {
                const bool valid = seen >> n & 1;
                const int64_t id = valid ? t.exclude.bank_ids[tile.slot + j + n] : kEmpty;
                seen &= ~(uint64_t(id == kEmpty) << n);
                w.ids[j + n] = id;
            }
        if (t.slot_bias)
            for (int n = 0; n < kSub; ++n) {
                const bool valid = seen >> n & 1;
                const float bias = valid ? t.slot_bias[tile.slot + j + n] : 0.0f;
                seen &= ~(uint64_t(bias == -kInfinity) << n);
                w.added[j + n] = t.temperature * bias;
            }
        tile.seen[j / kSub] = seen;
        unseen |= ~seen;
    }
    tile.whole = unseen == 0;
}

#if QUADS
// For mining: bytes along D.
void pack_quads(const Task& t, Worker& w, Tile& tile) {
    const int64_t ld = t.padded;
    for (int j = 0; j < tile.high; ++j) {
        Quantized q;
        read_row(t, tile.slot + j, w.rows, [&](auto as, const void* rows, int64_t first) {
            q = quantize_row<as.dtype>(rows, first, ld, w.bytes + j * ld);
        });
        w.slot_step[j] = q.step;
        tile.residual = larger(tile.residual, q.residual);
        tile.norm = larger(tile.norm, q.norm);
    }
    tile.residual = square_root(tile.residual), tile.norm = square_root(tile.norm);
    __builtin_memset(w.bytes + tile.high * ld, 0, size_t((tile.width - tile.high) * ld));
    for (int j = tile.high; j < tile.width; ++j) w.slot_step[j] = 1.0f;
    transpose_panels((const uint32_t*)w.bytes, ld / 4, ld / 4, tile.width, w.quads);
    for (int j = 0; j < tile.width; j += kWidth) {
        const uint32_t* quads = w.quads + j / kSub * (ld / 4) * kSub + j % kSub;
        I biased{};
        for (int64_t d = 0; d < ld / 4; ++d)
            biased = dot_bytes(biased, set1_i(0x80808080u), load_i(quads + d * kSub));
        store_i(w.slot_bias + j, -biased);
    }
}
#endif

#if PAIRS
// For sums over bf16, whose rows are pairs along D already: pairs along D and along slots.
void pack_pairs(const Task& t, Worker& w, const Tile& tile, bool in_place) {
    const int64_t ld = t.padded;
    const auto* bank = (const uint16_t*)t.bank;
    auto* rows = (uint16_t*)w.rows;
    if (!in_place) {
        __builtin_memset(rows, 0, size_t(tile.width * ld) * sizeof *rows);
        for (int j = tile.low; j < tile.high; ++j)
            __builtin_memcpy(rows + j * ld, bank + (tile.slot + j) * t.dim,
                             size_t(t.dim) * sizeof *rows);
    }
    const uint16_t* source = in_place ? bank + tile.slot * ld : rows;
    transpose_panels((const uint32_t*)source, ld / 2, ld / 2, tile.width, w.pairs);
    for (int j = 0; j < tile.width; j += 2)
        for (int64_t d = 0; d < ld; d += kWidth)
            store_interleaved(w.row_pairs + j / 2 * ld + d, load_bf16(source + j * ld + d),
                              load_bf16(source + (j + 1) * ld + d));
}
#endif

// The fp32 panel from 16-bit rows where they lie: pairs of columns move together and become fp32
// last, half the shuffles.
template <Dtype kDtype>
void pack_halves(const Task& t, Worker& w, const Tile& tile) {
    const int64_t ld = t.dim / 2;
    const auto* pairs = (const uint32_t*)t.bank + tile.slot * ld;
    for (int j = 0; j < tile.width; j += kTransposed) {
        float* panel = w.panel + (j / kSub) * t.dim * kSub + j % kSub;
        for (int64_t c = 0; c < ld; c += 4) {
            uint32_t columns[4 * kTransposed];
            transpose(pairs + j * ld + c, ld, columns, kTransposed);
            for (int n = 0; n < 4; ++n, panel += 2 * kSub) {
                V even, odd;
                if constexpr (kDtype == Dtype::kBFloat16)
                    split_bf16(columns + n * kTransposed, even, odd);
                else
                    split_fp16(columns + n * kTransposed, even, odd);
                store(panel, even);
                store(panel + kSub, odd);
            }
        }
    }
}

// The fp32 panel from fp32 rows. It holds D columns, not `padded`: the last four of a row may be
// partly padding.
void pack_floats(const Task& t, Worker& w, const Tile& tile) {
    const int64_t ld = t.padded, whole = t.dim / 4 * 4;
    const auto* rows = (const uint32_t*)tile.rows;
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

// The largest norm among the slots of the panel. A slot that holds NaN counts for nothing.
float largest_norm(const Task& t, const Worker& w, int width) {
    V top = set1(0.0f);
    for (int j = 0; j < width; j += kFlight * kWidth) {
        const float* panel = w.panel + (j / kSub) * t.dim * kSub + j % kSub;
        V squares[kFlight];
        for (V& x : squares) x = set1(0.0f);
        for (int64_t d = 0; d < t.dim; ++d, panel += kSub)
            for (int n = 0; n < kFlight; ++n) {
                const V x = load(panel + n * kWidth);
                squares[n] = fma(x, x, squares[n]);
            }
        for (const V& x : squares) top = max(x, top);  // the second where one is NaN
    }
    return square_root(largest(top));
}

Tile pack_tile(const Task& t, Worker& w, int64_t index) {
    Tile tile{};
    tile.slot = index * t.tile - t.lead;
    tile.low = tile.slot < 0 ? int(-tile.slot) : 0;
    tile.high = int(smaller(t.count - tile.slot, t.tile));
    tile.width = (tile.high + kSub - 1) / kSub * kSub;
    mark_slots(t, w, tile);
    if (t.sums && t.selection == Selection::kAffine)
        for (int j = 0; j < tile.width; ++j)
            w.added[j] = j < tile.low || j >= tile.high ? 0.0f : t.rho[tile.slot + j];
    if (t.direct) return tile;
    const int64_t ld = t.padded;
#if QUADS
    if (!t.sums) {
        pack_quads(t, w, tile);
        return tile;
    }
#endif
    const bool in_place = t.dim == ld && tile.low == 0 && tile.high == tile.width;
#if PAIRS
    if (t.query_pairs) {
        pack_pairs(t, w, tile, in_place);
        return tile;
    }
#endif
    const bool halves = in_place && t.dtype != Dtype::kFloat32;
    if (in_place && !halves) {
        tile.rows = (const float*)t.bank + tile.slot * ld;
    } else if (t.mean || !halves) {
        tile.rows = w.rows;
        for (int j = 0; j < tile.width; ++j) {
            float* row = w.rows + j * ld;
            if (j < tile.low || j >= tile.high)
                __builtin_memset(row, 0, size_t(ld) * sizeof(float));
            else
                convert(t, t.bank, tile.slot + j, row);
        }
    }
    if (!halves)
        pack_floats(t, w, tile);
    else if (t.dtype == Dtype::kBFloat16)
        pack_halves<Dtype::kBFloat16>(t, w, tile);
    else
        pack_halves<Dtype::kFloat16>(t, w, tile);
    if (!t.sums) tile.norm = largest_norm(t, w, tile.width);
    return tile;
}
