// Single rows: read as fp32, rounded, multiplied, made unit rows. Part of kernel.inl.

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

template <Dtype kDtype>
struct As {
    static constexpr Dtype dtype = kDtype;
};

// Calls run(As<dtype>).
template <class Run>
INLINE void with_dtype(Dtype dtype, Run run) {
    if (dtype == Dtype::kFloat32) run(As<Dtype::kFloat32>{});
    if (dtype == Dtype::kBFloat16) run(As<Dtype::kBFloat16>{});
    if (dtype == Dtype::kFloat16) run(As<Dtype::kFloat16>{});
}

void convert(const Task& t, const void* src, int64_t row, float* dst) {
    with_dtype(t.dtype, [&](auto as) {
        convert_row<as.dtype>(src, row * t.dim, t.dim, t.padded, dst);
    });
}

// Calls read(As<dtype>, rows, first element) for a row of the bank: where it lies, if it needs no
// padding, else in `buffer`.
template <class Read>
INLINE void read_row(const Task& t, int64_t slot, float* buffer, Read read) {
    if (t.dim == t.padded)
        return with_dtype(t.dtype, [&](auto as) { read(as, t.bank, slot * t.dim); });
    convert(t, t.bank, slot, buffer);
    read(As<Dtype::kFloat32>{}, buffer, 0);
}

template <Dtype kDtype>
INLINE float dot(const float* x, const void* rows, int64_t first, int64_t padded) {
    constexpr int kChains = kPad / kWidth < 4 ? kPad / kWidth : 4;  // hide the latency of an fma
    V acc[kChains];
    for (V& chain : acc) chain = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kChains * kWidth)
        for (int n = 0; n < kChains; ++n)
            acc[n] = fma(load(x + d + n * kWidth), load_as<kDtype>(rows, first + d + n * kWidth),
                         acc[n]);
    for (int n = 1; n < kChains; ++n) acc[0] = add(acc[0], acc[n]);
    return sum(acc[0]);
}

// Of a padded query and a row of the bank; `buffer` is for a row that has to be padded.
INLINE float product_with(const Task& t, const float* query, int64_t slot, float* buffer) {
    float product;
    read_row(t, slot, buffer, [&](auto as, const void* rows, int64_t first) {
        product = dot<as.dtype>(query, rows, first, t.padded);
    });
    return product;
}

INLINE float norm_of(const float* row, int64_t padded) {
    return square_root(dot<Dtype::kFloat32>(row, row, 0, padded));
}

// To the nearest value of a dtype, ties to even. Plain loops over bits, which the compiler turns into
// vectors.
void round_to(Dtype dtype, float* row, int64_t count) {
    if (dtype == Dtype::kBFloat16)
        for (int64_t d = 0; d < count; ++d) row[d] = round_bits<16>(row[d]);
    if (dtype == Dtype::kFloat16)
        for (int64_t d = 0; d < count; ++d) {
            const float fixed = (row[d] + 0.75f) - 0.75f;  // subnormal: units of 2^-24
            row[d] = __builtin_fabsf(row[d]) < 6.1035156e-5f ? fixed : round_bits<13>(row[d]);
        }
}

// Query i (padded,), rounded to the bank's dtype.
void read_query(const Task& t, int64_t i, float* row) {
    if (t.unit == nullptr) return convert(t, t.query, i, row);
    __builtin_memcpy(row, t.unit + i * t.padded, size_t(t.padded) * sizeof(float));
    round_to(t.dtype, row, t.padded);
}

// Squares are exact in double, and the order of the sum is the same for every instruction set.
double norm_in_double(const float* row, int64_t padded) {
    double lanes[kLanes] = {};
    for (int64_t d = 0; d < padded; d += kLanes)
        for (int n = 0; n < kLanes; ++n) lanes[n] += double(row[d + n]) * double(row[d + n]);
    for (int half = kLanes / 2; half > 0; half /= 2)  // in pairs: one after the other waits 16 times
        for (int n = 0; n < half; ++n) lanes[n] += lanes[n + half];
    return __builtin_sqrt(lanes[0]);
}

// Row i becomes a unit row (padded,); returns what it was divided by, 1 for a row of zeros.
float unit_row(const float* rows, int64_t i, int64_t dim, int64_t padded, float* unit) {
    convert_row<Dtype::kFloat32>(rows, i * dim, dim, padded, unit);
    float square = dot<Dtype::kFloat32>(unit, unit, 0, padded), norm = square_root(square);
    if (!(square > 1e-30f && square < 1e30f))  // squares of 1e30 and 1e-30 are numbers in double alone
        norm = float(norm_in_double(unit, padded));
    if (norm < kSmallestNormal) norm = 1.0f;  // as rows.py: zeros stay zeros
    for (int64_t d = 0; d < padded; ++d) unit[d] /= norm;
    return norm;
}

void unit_rows(const Task& t, const UnitRows& u, int64_t block) {
    const int64_t last = smaller((block + 1) * kBlock, t.rows);
    for (int64_t i = block * kBlock; i < last; ++i) {
        float *query = u.query + i * t.padded, *key = u.key + i * t.padded;
        u.norms[i] = unit_row(u.raw_query, i, t.dim, t.padded, query);
        unit_row(u.raw_key, i, t.dim, t.padded, key);
        u.s_pos[i] = dot<Dtype::kFloat32>(query, key, 0, t.padded);
    }
}
