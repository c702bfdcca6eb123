// PSM's finish where it loops over columns; the formulas are in finish.cpp. Included by isa_*.cpp
// after kernel.inl.

// The mined rows and their similarity to the unit query.
void read_mined(const Task& t, const MinedRow& m, const float* query, int64_t row) {
    convert_row<Dtype::kFloat32>(query, row * t.dim, t.dim, t.padded, m.query);
    for (int64_t c = 0; c < m.found; ++c) {
        convert(t, t.bank, m.slots[c], m.rows + c * t.padded);
        m.similarity[c] = dot<Dtype::kFloat32>(m.query, m.rows, c * t.padded, t.padded);
    }
}

// gradient (D,) = to_key key + to_mean mean + sum over the mined rows of to_mined row
void combine(const Task& t, const MinedRow& m, const float* key, const float* mean, int64_t row,
             float* gradient) {
    convert_row<Dtype::kFloat32>(key, row * t.dim, t.dim, t.padded, m.scratch);
    convert_row<Dtype::kFloat32>(mean, row * t.dim, t.dim, t.padded, m.query);
    const V to_key = set1(m.to_key), to_mean = set1(m.to_mean);
    for (int64_t d = 0; d < t.padded; d += kWidth) {
        V total = fma(to_mean, load(m.query + d), mul(to_key, load(m.scratch + d)));
        for (int64_t c = 0; c < m.found; ++c)
            total = fma(set1(m.to_mined[c]), load(m.rows + c * t.padded + d), total);
        store(m.scratch + d, total);
    }
    __builtin_memcpy(gradient + row * t.dim, m.scratch, size_t(t.dim) * sizeof(float));
}
