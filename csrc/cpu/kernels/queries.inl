// Queries and keys in the forms that the products read, and rows as bytes. Part of kernel.inl.

// One row as signed bytes times `step`, with what the bound on the error of a product needs.
// A row that holds NaN or inf has residual inf: no bound.
struct Quantized {
    float step, norm, residual;  // squares of the norms of the row and of (row - step * bytes)
};

#if QUADS
template <Dtype kDtype>
Quantized quantize_row(const void* rows, int64_t first, int64_t padded, int8_t* bytes) {
    V top = set1(0.0f), norm = set1(0.0f), residual = set1(0.0f);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load_as<kDtype>(rows, first + d);
        top = max(top, abs(x));
        norm = fma(x, x, norm);
    }
    Quantized q{largest(top) / 127.0f, sum(norm), kInfinity};
    if (!(q.norm < 1e36f && q.norm > 1e-36f)) {  // overflows, vanishes or is NaN
        for (int64_t d = 0; d < padded; ++d) bytes[d] = 0;
        const bool zero = largest(top) == 0.0f && q.norm == 0.0f;
        return zero ? Quantized{1.0f, 0.0f, 0.0f} : Quantized{1.0f, q.norm, kInfinity};
    }
    const V inverse = set1(127.0f / largest(top)), step = set1(q.step);
    for (int64_t d = 0; d < padded; d += kWidth) {
        const V x = load_as<kDtype>(rows, first + d);
        const V error = sub(x, mul(step, quantize(mul(x, inverse), bytes + d)));
        residual = fma(error, error, residual);
    }
    q.residual = sum(residual);
    return q;
}
#endif

void set_bound(const Task& t, int64_t i, float inverse, float norm, float residual) {
    const bool finite = norm < kInfinity;
    const float slack = 1.0001f * inverse;  // the norms are rounded as well
    t.inverse[i] = inverse;
    t.norm[i] = finite ? larger(slack * norm, 1e-30f) : 0.0f;  // not 0: 0 * inf is NaN
    t.residual[i] = finite ? larger(slack * residual, 1e-30f) : 0.0f;
    for (int64_t row = i; row < t.heap_sets * t.rows; row += t.rows) {
        t.bars[row] = finite ? -kInfinity : kInfinity;  // NaN or inf in a key: it finds nothing
        __builtin_memset(t.heaps + row * t.topk, 0, size_t(t.topk) * sizeof(uint64_t));
    }
}

uint32_t bf16_bits(float x) { return float_to_bits(x) >> 16; }  // x is a bf16 already

void prepare(const Task& t, int64_t block) {
    float* scratch = (float*)__builtin_alloca(size_t(t.padded) * sizeof(float));
    const int64_t rows = smaller(t.rows - block * kBlock, kBlock);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = block * kBlock + r;
        float* row = t.sums ? scratch : t.query_rows + i * t.padded;
        read_query(t, i, row);
        if (t.direct) {
            set_bound(t, i, 1.0f, norm_of(row, t.padded), 0.0f);
            continue;
        }
#if QUADS
        if (!t.sums) {
            int8_t* bytes = (int8_t*)scratch;
            const Quantized q = quantize_row<Dtype::kFloat32>(row, 0, t.padded, bytes);
            uint32_t* panel = t.query_quads + block * (t.padded / 4) * kBlock + r;
            for (int64_t d = 0; d < t.padded / 4; ++d) {
                uint32_t quad;
                __builtin_memcpy(&quad, bytes + 4 * d, 4);
                panel[d * kBlock] = quad ^ 0x80808080u;  // byte + 128 as an unsigned byte
            }
            set_bound(t, i, 1.0f / q.step, square_root(q.norm), square_root(q.residual));
            continue;
        }
#endif
        if (t.query_pairs) {
            uint32_t* panel = t.query_pairs + block * (t.padded / 2) * kBlock + r;
            for (int64_t d = 0; d < t.padded / 2; ++d)
                panel[d * kBlock] = bf16_bits(row[2 * d]) | bf16_bits(row[2 * d + 1]) << 16;
        } else {
            float* panel = t.query_panel + block * t.dim * kBlock + r;
            for (int64_t d = 0; d < t.dim; ++d) panel[d * kBlock] = row[d];
            if (!t.sums) set_bound(t, i, 1.0f, norm_of(row, t.padded), 0.0f);
        }
    }
}
