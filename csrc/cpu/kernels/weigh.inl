// Scores of one row become weights, sums and counts. Part of kernel.inl.
//
// Weights are 2^(x - shift). The shift is the x of some kept slot, moved up when another exceeds
// it by kHeadroom: the largest weight stays in [1, 2^40] and its square below 2^80, so neither
// the sums over any bank overflow nor does anything that matters underflow.

constexpr float kHeadroom = 40.0f;

// t = 2^(t + kLog2Scale) for t <= 127; 0 below t = -127; NaN stays NaN. Relative error 1.5e-7.
// Adding 1.5 * 2^23 + 127 leaves the biased exponent of 2^round(t) in the low bits: additions and
// a shift, where scalef and reduce of AVX-512 take 2 cycles each on Zen 4.
template <int kLog2Scale, int kVectors>
INLINE void exp2(V (&t)[kVectors]) {
    const V magic = set1(12582912.0f + 127.0f);
    V biased[kVectors], p[kVectors];
    for (V& x : t) x = max(set1(-127.0f), x);
    for (int n = 0; n < kVectors; ++n) biased[n] = add(t[n], magic);
    for (int n = 0; n < kVectors; ++n) t[n] = sub(t[n], sub(biased[n], magic));
    for (V& x : p) x = set1(kExp2[5] * (1ull << kLog2Scale));
    for (int i = 4; i >= 0; --i)
        for (int n = 0; n < kVectors; ++n)
            p[n] = fma(p[n], t[n], set1(kExp2[i] * (1ull << kLog2Scale)));
    for (int n = 0; n < kVectors; ++n) t[n] = mul(p[n], shift_to_exponent(biased[n]));
}

// log2(p) before the cap becomes what a noise word has to stay below, 2^32 p.
template <int kVectors>
INLINE void keep_threshold(V (&power)[kVectors]) {
    exp2<32>(power);
    for (V& x : power) x = min(x, set1(0.999f * 4294967296.0f));
}

INLINE bool holds(const int64_t* ids, int width, int64_t id) {
    int64_t found = 0;
    for (int j = 0; j < width; ++j) found |= -int64_t(ids[j] == id);
    return found != 0;
}

// Whether there are slots of the tile that row i must not see; their bits are then in w.hidden.
// Tiles of an item come in ascending order, so a list that ends with kNoSlot takes one comparison.
INLINE bool hide(const Task& t, const Worker& w, const Tile& tile, int64_t i,
                 const int64_t*& next) {
    const int64_t end = tile.slot + tile.width;
    const int64_t id = t.exclude.ids ? t.exclude.ids[i] : kEmpty;
    const bool own = id != kEmpty && holds(w.ids, tile.width, id);
    if (tile.whole && *next >= end && !own) return false;
    for (int panel = 0; panel < tile.width / kSub; ++panel) w.hidden[panel] = ~tile.seen[panel];
    for (; *next < end; ++next) {
        const int64_t j = *next - tile.slot;
        if (j >= 0) w.hidden[j / kSub] |= 1ull << j % kSub;
    }
    for (int j = 0; own && j < tile.width; ++j)
        w.hidden[j / kSub] |= uint64_t(w.ids[j] == id) << j % kSub;
    return true;
}

// Calls set(j) for each hidden slot; returns how many there are.
template <class Set>
INLINE int each_hidden(const Worker& w, const Tile& tile, Set set) {
    int count = 0;
    for (int panel = 0; panel < tile.width / kSub; ++panel) {
        count += __builtin_popcountll(w.hidden[panel]);
        for (uint64_t mask = w.hidden[panel]; mask; mask &= mask - 1)
            set(panel * kSub + __builtin_ctzll(mask));
    }
    return count;
}

INLINE void scale_lanes(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, mul(load(x + i), set1(factor)));
}

NOINLINE void move_shift(const Task& t, RowSums& row, float* mean, V top) {
    const float shift = largest(top), factor = power_of_two(row.shift - shift);
    scale_lanes(row.sum, kLanes, factor);
    if (t.mean) scale_lanes(mean, t.padded, factor);
    if (t.selection != Selection::kExpected) scale_lanes(row.squares, kLanes, factor * factor);
    row.shift = shift;
}

template <Selection kSelection>
void weigh(const Task& t, const Worker& w, const Tile& tile, int64_t i, RowSums& row, float* mean,
           [[maybe_unused]] uint64_t* kept_slots, float* scores) {
    const V scale = set1(t.scale), slope = set1(t.slope);
    V top = set1(-kInfinity);
    const bool hides = hide(t, w, tile, i, row.next);
    int kept = tile.width;
    if constexpr (kSelection == Selection::kBernoulli) {
        philox_row(t, tile, w.columns, i, w.words);
        if (hides)  // above every threshold
            each_hidden(w, tile, [&](int j) { w.words[j] = 0xFFFFFFFFu; });
        const V center = set1(t.s_pos[i] + t.b);
        kept = 0;
        for (int panel = 0; panel < tile.width / kSub; ++panel) kept_slots[panel] = 0;
        for (int j = 0; j < tile.width; j += kFlight * kWidth) {
            V s[kFlight], p[kFlight];
            for (int n = 0; n < kFlight; ++n) s[n] = load(scores + j + n * kWidth);
            for (int n = 0; n < kFlight; ++n) p[n] = sub(s[n], center);
            for (V& x : p) x = mul(mul(x, x), slope);
            keep_threshold(p);
            uint64_t mask = 0;
            for (int n = 0; n < kFlight; ++n) {
                s[n] = keep(s[n], w.words + j + n * kWidth, p[n], mask, n * kWidth);
                store(scores + j + n * kWidth, s[n]);
                top = max(top, s[n]);
            }
            kept_slots[j / kSub] |= mask << j % kSub;
            kept += __builtin_popcountll(mask);
        }
    } else {
        if (t.slot_bias)
            for (int j = 0; j < tile.width; j += kWidth)
                store(scores + j, add(load(scores + j), load(w.added + j)));
        if (hides) kept -= each_hidden(w, tile, [&](int j) { scores[j] = -kInfinity; });
        for (int j = 0; j < tile.width; j += kWidth) top = max(top, load(scores + j));
    }
    if (kept == 0) {
        __builtin_memset(scores, 0, size_t(tile.width) * sizeof(float));
        return;
    }
    row.count[0] += float(kept);
    top = mul(top, scale);
    if (any_above(top, set1(row.shift + kHeadroom))) move_shift(t, row, mean, top);
    const V shift = set1(-row.shift);
    V total = set1(0.0f), squares = set1(0.0f);
    for (int j = 0; j < tile.width; j += kFlight * kWidth) {
        V e[kFlight];
        for (int n = 0; n < kFlight; ++n) e[n] = fma(load(scores + j + n * kWidth), scale, shift);
        exp2<0>(e);
        for (int n = 0; n < kFlight; ++n) {
            store(scores + j + n * kWidth, e[n]);
            total = add(total, e[n]);
            squares = fma(e[n], e[n], squares);
        }
    }
    store(row.sum, add(load(row.sum), total));
    store(row.squares, add(load(row.squares), squares));
}

// Weights p exp(s/tau): p may be tiny where exp(s/tau) is large, so that sum p exp(2s/tau) has a
// shift of its own.
template <>
void weigh<Selection::kExpected>(const Task& t, const Worker& w, const Tile& tile, int64_t i,
                                 RowSums& row, float* mean, uint64_t*, float* scores) {
    const V scale = set1(t.scale), slope = set1(t.slope), cap = set1(kLog2Cap);
    const V center = set1(t.s_pos[i] + t.b);
    float *squares = w.scratch, *chance = w.scratch + kTile;
    for (int j = 0; j < tile.width; j += kWidth) {
        const V s = load(scores + j), x = sub(s, center);
        const V p = min(mul(mul(x, x), slope), cap), weight = fma(s, scale, p);
        store(chance + j, p);
        store(scores + j, weight);
        store(squares + j, fma(s, scale, weight));
    }
    if (hide(t, w, tile, i, row.next))
        each_hidden(w, tile, [&](int j) { scores[j] = squares[j] = chance[j] = -kInfinity; });
    V top = set1(-kInfinity), sq_top = top;
    for (int j = 0; j < tile.width; j += kWidth) {
        top = max(top, load(scores + j));
        sq_top = max(sq_top, load(squares + j));
    }
    if (any_above(top, set1(row.shift + kHeadroom))) move_shift(t, row, mean, top);
    if (any_above(sq_top, set1(row.sq_shift + kHeadroom))) {
        const float shift = largest(sq_top);
        scale_lanes(row.squares, kLanes, power_of_two(row.sq_shift - shift));
        row.sq_shift = shift;
    }
    if (row.shift == -kInfinity) {  // every chance underflowed
        __builtin_memset(scores, 0, size_t(tile.width) * sizeof(float));
        return;
    }
    const V shift = set1(-row.shift), sq_shift = set1(-row.sq_shift);
    for (int j = 0; j < tile.width; j += kWidth) {
        V e[3] = {add(load(scores + j), shift), add(load(squares + j), sq_shift), load(chance + j)};
        exp2<0>(e);
        store(scores + j, e[0]);
        store(row.sum, add(load(row.sum), e[0]));
        store(row.squares, add(load(row.squares), e[1]));
        store(row.count, add(load(row.count), e[2]));
    }
}

// Weights that are affine in s and e = exp((s - top)/tau). The row's top is given, so it is the
// shift from the first tile on.
template <>
void weigh<Selection::kAffine>(const Task& t, const Worker& w, const Tile& tile, int64_t i,
                               RowSums& row, float*, uint64_t*, float* scores) {
    const float* affine = t.affine + i;
    const V alpha = set1(affine[0]), beta = set1(affine[t.rows]), gamma = set1(affine[2 * t.rows]);
    const V scale = set1(t.scale), cap = set1(affine[4 * t.rows]), zero = set1(0.0f);
    row.shift = affine[3 * t.rows] * t.scale;
    const V shift = set1(-row.shift);
    float* weights = w.scratch;
    for (int j = 0; j < tile.width; j += kWidth) {
        const V s = load(scores + j);
        V e[1] = {fma(s, scale, shift)};
        exp2<0>(e);
        const V line = fma(beta, s, add(alpha, load(w.added + j)));
        const V weight = max(zero, fma(gamma, min(cap, e[0]), line));  // NaN stays NaN
        store(weights + j, weight);
        store(scores + j, mul(weight, e[0]));
    }
    if (hide(t, w, tile, i, row.next))
        each_hidden(w, tile, [&](int j) { scores[j] = weights[j] = 0.0f; });
    V total = load(row.sum), count = load(row.count);
    for (int j = 0; j < tile.width; j += kWidth) {
        total = add(total, load(scores + j));
        count = add(count, load(weights + j));
    }
    store(row.sum, total);
    store(row.count, count);
}
