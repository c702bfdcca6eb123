// A key becomes a row of the bank: the bits that psm_kernels/rows.py and a cast give. Part of
// kernel.inl.

// The nearest half of |x| < 65520, ties to even.
INLINE uint16_t float_to_half(float x) {
    const float size = __builtin_fabsf(x);
    // Next to 0.5 a float counts units of 2^-24, as the subnormal halves do.
    const uint32_t small = float_to_bits(size + 0.5f) - float_to_bits(0.5f);
    const uint32_t normal = (float_to_bits(round_bits<13>(size)) >> 13) - (112u << 10);
    return uint16_t((size < 6.1035156e-5f ? small : normal) | (float_to_bits(x) >> 16 & 0x8000));
}

// The first `dim` of a row of finite numbers, rounded to the dtype, from element `first` on.
void store_row(const float* row, int64_t dim, Dtype dtype, void* rows, int64_t first) {
    if (dtype == Dtype::kFloat32)
        __builtin_memcpy((float*)rows + first, row, size_t(dim) * sizeof(float));
    uint16_t* half = (uint16_t*)rows + first;
    if (dtype == Dtype::kBFloat16)
        for (int64_t d = 0; d < dim; ++d)
            half[d] = uint16_t(float_to_bits(round_bits<16>(row[d])) >> 16);
    if (dtype == Dtype::kFloat16)
        for (int64_t d = 0; d < dim; ++d) half[d] = float_to_half(row[d]);
}

void enqueue_row(const EnqueueArgs& args, int64_t row, int64_t slot) {
    const Bank& bank = args.bank;
    const int64_t dim = bank.dim, padded = (dim + kPad - 1) / kPad * kPad;
    float* unit = (float*)__builtin_alloca(size_t(padded) * sizeof(float));
    with_dtype(args.key_dtype, [&](auto as) {
        convert_row<as.dtype>(args.keys, row * dim, dim, padded, unit);
    });
    const double exact = norm_in_double(unit, padded);
    const float norm = exact < double(kSmallestNormal) ? 1.0f : float(exact);
    for (int64_t d = 0; d < padded; ++d) unit[d] /= norm;
    if (!(norm < kInfinity))  // with a NaN or an infinity the norm is one too: all zeros
        for (int64_t d = 0; d < padded; ++d) unit[d] = unit[d] == unit[d] ? unit[d] : 0.0f;
    store_row(unit, dim, bank.dtype, const_cast<void*>(bank.rows), slot * dim);
}
