// Mining of the top-k. Part of kernel.inl.
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
        const int64_t sibling = child + 1 < size ? child + 1 : child;
        child = heap[sibling] < heap[child] ? sibling : child;  // no branch: it would be random
        if (entry <= heap[child]) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = entry;
}

// approximate (kRows, kTile) = similarities of the rows of a block to one panel of the bank.
template <int kRows>
void screen(const Task& t, const Worker& w, int64_t block, int panel, float* approximate) {
#if QUADS
    I acc[kRows][kPanels];
    for (int n = 0; n < kPanels; ++n)
        for (int r = 0; r < kRows; ++r)
            acc[r][n] = load_i(w.slot_bias + panel * kSub + n * kWidth);
    const int64_t quads = t.padded / 4;
    const uint32_t* query = t.query_quads + block * quads * kBlock;
    const uint32_t* m = w.quads + panel * quads * kSub;
    for (int64_t d = 0; d < quads; ++d, query += kBlock, m += kSub) {
        I bank[kPanels];
        for (int n = 0; n < kPanels; ++n) bank[n] = load_i(m + n * kWidth);
        for (int r = 0; r < kRows; ++r) {
            const I x = set1_i(query[r]);
            for (int n = 0; n < kPanels; ++n) acc[r][n] = dot_bytes(acc[r][n], x, bank[n]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kPanels; ++n)
            store(approximate + r * kTile + n * kWidth,
                  mul(to_float(acc[r][n]), load(w.slot_step + panel * kSub + n * kWidth)));
#else
    product<Floats, kRows>(t.query_panel + block * t.dim * kBlock, w.panel + panel * t.dim * kSub,
                           t.dim, approximate);
#endif
}

// A bit per slot of a panel whose value is at least `floor`.
INLINE uint64_t reaching(const float* values, float floor) {
    uint64_t mask = 0;
    for (int n = 0; n < kSub; n += kWidth) mask |= at_least(load(values + n), set1(floor)) << n;
    return mask;
}

// `wanted` or more of the largest values of a panel, seldom many more.
INLINE uint64_t largest_of(const float* values, int64_t wanted) {
    V top = set1(-kInfinity), bottom = top;
    for (int n = 0; n < kSub; n += kWidth) {
        top = max(top, load(values + n));
        bottom = max(bottom, sub(set1(0.0f), load(values + n)));
    }
    float low = -largest(bottom), high = largest(top);
    uint64_t found = reaching(values, low);
    for (int i = 0; i < 6; ++i) {
        const float middle = 0.5f * (low + high);
        const uint64_t mask = reaching(values, middle);
        const bool enough = __builtin_popcountll(mask) >= wanted;
        if (enough) found = mask;
        (enough ? low : high) = middle;
    }
    return found;
}

bool is_hidden(const Task& t, int64_t i, int64_t slot) {
    const Exclude& x = t.exclude;
    bool hidden = x.ids && x.bank_ids[slot] == x.ids[i];
    for (int64_t e = 0; e < x.listed; ++e) hidden |= x.slots[i * x.listed + e] == slot;
    return hidden;
}

// It holds a NaN or an infinity: see set_bound.
bool finds_nothing(const Task& t, int64_t i) { return t.norm[i] == 0.0f; }

// Offers slots, of these exact similarities, to the heap of row i.
INLINE void offer(const Task& t, const Worker& w, int64_t i, int64_t slot, uint64_t slots,
                  const float* exact) {
    uint64_t* heap = w.heaps + i * t.topk;
    for (uint64_t mask = slots; mask; mask &= mask - 1) {
        const int j = __builtin_ctzll(mask);
        if (exact[j] != exact[j]) continue;
        const uint64_t entry = heap_entry(exact[j], slot + j);
        if (entry <= heap[0] || is_hidden(t, i, slot + j)) continue;
        heap_replace_root(heap, t.topk, entry);
        w.bars[i] = heap_similarity(heap[0]) * t.inverse[i];
    }
}

INLINE void mine_row(const Task& t, const Worker& w, int64_t i, int64_t slot, uint64_t slots) {
    const float* query = t.query_rows + i * t.padded;
    // All products first: a branch on one waits for it, 4 % of bank_topk at k = 200.
    float exact[kSub];
    for (uint64_t mask = slots; mask; mask &= mask - 1) {
        const int j = __builtin_ctzll(mask);
        exact[j] = product_with(t, query, slot + j, w.rows);
    }
    offer(t, w, i, slot, slots, exact);
}

// The exact products of all slots that the rows may see.
void mine_directly(const Task& t, const Worker& w, const Tile& tile) {
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        const int64_t slot = tile.slot + panel * kSub;
        const int low = tile.low > panel * kSub ? tile.low - panel * kSub : 0;
        const int high = int(smaller(tile.high - panel * kSub, kSub));
        for (int64_t i = 0; i < t.rows; ++i) {
            if (finds_nothing(t, i)) continue;
            const float* query = t.query_rows + i * t.padded;
            float exact[kSub] = {};
            for (int j = low; j < high; ++j)
                exact[j] = product_with(t, query, slot + j, w.rows);
            offer(t, w, i, slot, reaching(exact, w.bars[i]) & tile.seen[panel], exact);
        }
    }
}

template <int kRows>
void mine(const Task& t, const Worker& w, const Tile& tile, int64_t block) {
    if (t.direct) return mine_directly(t, w, tile);  // of one block
    const int64_t first_row = block * kBlock;
    // fp32 rounding of the exact product and of the steps below: D + 16 roundings, doubled.
    const float rounding = float(t.padded + 16) * 1.2e-7f;
    float from_norm = tile.residual + rounding * tile.norm;
    float from_residual = tile.norm + tile.residual;
    if (!(from_norm < kInfinity)) from_norm = from_residual = kInfinity;  // no bound: take all
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        const int64_t slot = tile.slot + panel * kSub;
        screen<kRows>(t, w, block, panel, w.scores);
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = first_row + r;
            if (finds_nothing(t, i)) continue;
            const float* approximate = w.scores + r * kTile;
            uint64_t seen = tile.seen[panel];
            // With nothing to compare with, the best of the first panel are mined before the rest.
            if (w.bars[i] == -kInfinity && t.topk < kSub) {
                const uint64_t first = largest_of(approximate, t.topk);
                mine_row(t, w, i, slot, first & seen);
                seen &= ~first;
            }
            // |q.m - q'.m'| <= |q| |m - m'| + |q - q'| |m'|
            const float error = t.norm[i] * from_norm + t.residual[i] * from_residual;
            mine_row(t, w, i, slot, reaching(approximate, w.bars[i] - error) & seen);
        }
    }
}
