// A step's rows after the pass, where it loops over columns; the formulas are in driver/step.cpp.
// Part of kernel.inl.

// mean (padded,) = scale * sum over the chunks of factor * the mean of the part
void merge_mean(const Task& t, int64_t row, const float* factors, float scale, float* mean) {
    for (int64_t d = 0; d < t.padded; d += kWidth) {
        V total = set1(0.0f);
        for (int64_t c = 0; c < t.chunks; ++c)
            total = fma(set1(factors[c]), load(t.part_mean + (c * t.rows + row) * t.padded + d),
                        total);
        store(mean + d, mul(set1(scale), total));
    }
}

void similarities(const Task& t, const float* query, const int64_t* slots, int64_t count,
                  float* buffer, float* similarity) {
    for (int64_t c = 0; c < count; ++c) similarity[c] = product_with(t, query, slots[c], buffer);
}

INLINE void add_scaled(float* total, float factor, const float* row, int64_t padded) {
    for (int64_t d = 0; d < padded; d += kWidth)
        store(total + d, fma(set1(factor), load(row + d), load(total + d)));
}

// gradient (D,) by the query as it came: the part along the unit query does nothing, the rest
// counts per length.
void gradient(const Task& t, const RowTerms& r, float* buffer, float* gradient) {
    float *total = buffer, *padded_row = buffer + t.padded;
    __builtin_memset(total, 0, size_t(t.padded) * sizeof(float));
    add_scaled(total, r.to_key, r.key, t.padded);
    add_scaled(total, r.to_mean, r.mean, t.padded);
    for (int64_t c = 0; c < r.mined; ++c)
        read_row(t, r.slots[c], padded_row, [&](auto as, const void* rows, int64_t first) {
            const V factor = set1(r.to_mined[c]);
            for (int64_t d = 0; d < t.padded; d += kWidth)
                store(total + d, fma(factor, load_as<as.dtype>(rows, first + d), load(total + d)));
        });
    const float along = dot<Dtype::kFloat32>(total, r.query, 0, t.padded);
    add_scaled(total, -along, r.query, t.padded);
    for (int64_t d = 0; d < t.dim; ++d) gradient[d] = total[d] / r.norm;
}
