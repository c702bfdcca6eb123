// Partial results of a row become one, in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pass.h"

namespace psm::cpu {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

double log_of(double sum, float shift) {
    return sum == 0.0 ? -kInfinity : (std::log2(sum) + double(shift)) * kLn2;
}

}  // namespace

Sums merge_sums(const Kernels& kernels, const Task& t, int64_t row, float* mean) {
    float shift = -kInfinity, sq_shift = -kInfinity;
    for (int64_t c = 0; c < t.chunks; ++c) {
        shift = std::max(shift, t.part_shift[c * t.rows + row]);
        sq_shift = std::max(sq_shift, t.part_sq_shift[c * t.rows + row]);
    }
    double sum = 0.0, squares = 0.0, count = 0.0;
    float factors[kMaxChunks] = {};
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t at = c * t.rows + row;
        count += t.part_count[at];
        // An empty part has shift -inf; a part spoiled by NaN must still be added.
        if (t.part_shift[at] == -kInfinity && t.part_sum[at] == 0.0f) continue;
        factors[c] = std::exp2(t.part_shift[at] - shift);
        sum += double(factors[c]) * t.part_sum[at];
        squares += double(std::exp2(t.part_sq_shift[at] - sq_shift)) * t.part_sq[at];
    }
    if (t.mean)
        kernels.merge_mean(t, row, factors, sum == 0.0 ? 0.0f : float(1.0 / sum), mean);
    return {log_of(sum, shift), log_of(squares, sq_shift), count};
}

void Pass::merge_heaps(int64_t row) const {
    const Task& t = mining;
    const auto descending = std::greater<uint64_t>();
    uint64_t* best = t.heaps + row * t.topk;  // of the first set; the others lose to it
    uint64_t* last = best + t.topk;
    std::make_heap(best, last, descending);
    for (int64_t s = 1; s < t.heap_sets; ++s) {
        const uint64_t* others = t.heaps + (s * t.rows + row) * t.topk;
        for (int64_t n = 0; n < t.topk; ++n) {
            if (others[n] <= *best) continue;
            std::pop_heap(best, last, descending);
            last[-1] = others[n];
            std::push_heap(best, last, descending);
        }
    }
    std::sort(best, last, descending);
    for (int64_t n = 0; n < t.topk; ++n) {
        float sim = -kInfinity;
        int64_t index = -1;
        if (best[n] != 0) {
            const uint32_t ordered = uint32_t(best[n] >> 32);
            const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
            std::memcpy(&sim, &bits, sizeof sim);
            index = int64_t(0xFFFFFFFFu - uint32_t(best[n]));
        }
        if (topk_sim_) topk_sim_[row * t.topk + n] = sim;
        topk_index_[row * t.topk + n] = index;
    }
}

// The slots that the sums of a row leave out, those that were mined among them.
void Pass::list_hidden(int64_t row) const {
    const Task& t = sums;
    const int64_t mined = t.most_hidden - 1 - t.exclude.listed;
    int64_t *list = t.hidden + row * t.most_hidden, *end = list;
    const auto add = [&](const int64_t* slots, int64_t count) {
        end = std::copy_if(slots, slots + count, end,
                           [&](int64_t slot) { return slot >= 0 && slot < t.count; });
    };
    add(t.exclude.slots + row * t.exclude.listed, t.exclude.listed);
    add(topk_index_ + row * mined, mined);
    std::sort(list, end);
    *end = kNoSlot;
}

}  // namespace psm::cpu
