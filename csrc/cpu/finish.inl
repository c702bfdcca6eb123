// PSM's finish where it loops over columns; the formulas are in finish.cpp. Included by isa_*.cpp
// after kernel.inl.

constexpr int kChains = 8;  // sums in flight: each waits four cycles for its last addition
static_assert(kMinedPad % kChains == 0 && kMinedPad % kWidth == 0);

// Products of the query with kChains mined rows. They decide again what the pass kept, so they have
// to have its bits: the same chain of additions along the columns as product(), product_pairs().
INLINE void products_of_pass(const Task& t, const float* query, const float* rows, float* out) {
    V acc[kChains];
    for (int c = 0; c < kChains; ++c) acc[c] = set1(0.0f);
#if PSM_PAIRS
    const auto pair = [](const float* x) { return bf16_bits(x[0]) | bf16_bits(x[1]) << 16; };
    for (int64_t d = 0; d < t.padded; d += 2) {
        const I x = set1_i(pair(query + d));
        for (int c = 0; c < kChains; ++c)
            acc[c] = dot_pairs(acc[c], x, set1_i(pair(rows + c * t.padded + d)));
    }
#else
    for (int64_t d = 0; d < t.dim; ++d) {
        const V x = set1(query[d]);
        for (int c = 0; c < kChains; ++c) acc[c] = fma(x, set1(rows[c * t.padded + d]), acc[c]);
    }
#endif
    for (int c = 0; c < kChains; ++c) {
        float lanes[kWidth];
        store(lanes, acc[c]);
        out[c] = lanes[0];
    }
}

// What the pass made of the mined rows: their similarity to the query as it saw it, their weight.
void read_mined(const Task& t, const MinedRow& m, const float* query, int64_t row) {
    convert(t, t.query, row, m.seen);
    convert_row<Dtype::kFloat32>(query, row * t.dim, t.dim, t.padded, m.query);
    for (int64_t c = 0; c < m.found; ++c) convert(t, t.bank, m.slots[c], m.rows + c * t.padded);
    for (int64_t c = 0; c < m.found; c += kChains)
        products_of_pass(t, m.seen, m.rows + c * t.padded, m.similarity + c);
    for (int64_t c = 0; c < m.found; ++c) {
        V score = set1(0.0f);
        for (int64_t d = 0; d < t.padded; d += kWidth)
            score = fma(load(m.query + d), load(m.rows + c * t.padded + d), score);
        m.score[c] = sum(score);
    }
    const V center = set1(t.s_pos[row] + t.b), slope = set1(t.slope);
    for (int64_t c = 0; c < m.found; c += kWidth) {
        const V s = load(m.similarity + c), x = sub(s, center);
        V weight[1] = {mul(mul(x, x), slope)};
        if (t.selection == Selection::kBernoulli) {
            uint64_t kept = 0;
            keep_threshold(weight);
            keep(s, m.words + c, weight[0], kept, 0);
            for (int n = 0; n < kWidth; ++n) m.weight[c + n] = kept >> n & 1;
            continue;
        }
        weight[0] = min(weight[0], set1(kLog2Cap));
        exp2<0>(weight);
        store(m.weight + c, t.selection == Selection::kAll ? set1(1.0f) : weight[0]);
    }
}

// gradient (D,) = to_key key + to_mean mean + sum over the mined rows of to_mined row
void combine(const Task& t, const MinedRow& m, const float* key, const float* mean, int64_t row,
             float* gradient) {
    convert_row<Dtype::kFloat32>(key, row * t.dim, t.dim, t.padded, m.seen);
    convert_row<Dtype::kFloat32>(mean, row * t.dim, t.dim, t.padded, m.query);
    const V to_key = set1(m.to_key), to_mean = set1(m.to_mean);
    for (int64_t d = 0; d < t.padded; d += kWidth) {
        V total = fma(to_mean, load(m.query + d), mul(to_key, load(m.seen + d)));
        for (int64_t c = 0; c < m.found; ++c)
            total = fma(set1(m.to_mined[c]), load(m.rows + c * t.padded + d), total);
        store(m.seen + d, total);
    }
    __builtin_memcpy(gradient + row * t.dim, m.seen, size_t(t.dim) * sizeof(float));
}
