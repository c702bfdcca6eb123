// Register-blocked products, fp32 and bf16 pairs. Part of kernel.inl.

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
    accumulate<kRows, kColumns>(w.scores, tile.rows + d, tile.high, ld, mean + d);
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

// The same for two rows that keep only some slots. Masks are walked bit by bit on ports that the
// products leave idle; slots that both rows keep are loaded once. With 65 % kept this takes 73 % of
// the time of the above, with 95 % as long. Slots that only one keeps come last, so that the last
// bit of a row's mean depends on what its neighbor keeps.
template <int kColumns>
void accumulate_kept(const float* weights, uint64_t kept0, uint64_t kept1, const float* rows,
                     int64_t ld, float* mean0, float* mean1) {
    V acc[2][kColumns];
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
        acc[0][n] = load(mean0 + n * kWidth);
        acc[1][n] = load(mean1 + n * kWidth);
    }
    for (uint64_t mask = kept0 & kept1; mask; mask &= mask - 1) {
        const int j = __builtin_ctzll(mask);
        const V x = set1(weights[j]), y = set1(weights[kTile + j]);
        V bank[kColumns];  // not loaded where it is used: GCC would load it twice
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) bank[n] = load(rows + j * ld + n * kWidth);
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) {
            acc[0][n] = fma(x, bank[n], acc[0][n]);
            acc[1][n] = fma(y, bank[n], acc[1][n]);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
        for (uint64_t mask = r ? kept1 & ~kept0 : kept0 & ~kept1; mask; mask &= mask - 1) {
            const int j = __builtin_ctzll(mask);
            const V x = set1(weights[r * kTile + j]);
#pragma GCC unroll 8
            for (int n = 0; n < kColumns; ++n)
                acc[r][n] = fma(x, load(rows + j * ld + n * kWidth), acc[r][n]);
        }
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
        store(mean0 + n * kWidth, acc[0][n]);
        store(mean1 + n * kWidth, acc[1][n]);
    }
}

// Wide rows evict one another from L1, and with AVX2 the loads take as long as the saved products.
bool skips_slots(const Task& t) {
    return t.mean && t.selection == Selection::kBernoulli && !t.query_pairs && t.padded <= 512 &&
           kWidth == 16;
}

// For all rows of a gang, 32 slots at a time: 16 KB of the bank at D = 128 stay in L1.
void accumulate_kept_rows(const Task& t, const Worker& w, const Tile& tile, int64_t rows,
                          float* mean) {
    const int64_t ld = t.padded;
    int columns = 2 * kPanels;
    for (int64_t d = 0; d < ld; d += columns * kWidth) {
        while (d + columns * kWidth > ld) columns /= 2;
        const auto run = columns == 2 * kPanels ? accumulate_kept<2 * kPanels>
                         : columns == kPanels   ? accumulate_kept<kPanels>
                                                : accumulate_kept<kPanels / 2>;
        for (int j = 0; j < tile.high; j += 32)
            for (int64_t r = 0; r < rows; r += 2) {
                const uint64_t* kept = w.kept + (r * kTile + j) / kSub;
                const bool pair = r + 1 < rows;
                const uint32_t kept0 = uint32_t(kept[0] >> j % kSub);
                const uint32_t kept1 = pair ? uint32_t(kept[kTile / kSub] >> j % kSub) : 0;
                float* mean0 = mean + r * ld + d;
                run(w.scores + r * kTile + j, kept0, kept1, tile.rows + j * ld + d, ld, mean0,
                    pair ? mean0 + ld : w.scratch);
            }
    }
}
