// PSM's finish on the CPU: loss, gradient and statistics of each row from its 1 + k positives and
// the sums of a pass. The formulas are those of psm_kernels/functional/psm.py, differentiated by
// hand; the loops over columns are in finish.inl.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../philox.h"
#include "driver.h"

namespace psm::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The memory behind a MinedRow and what else finish_row needs per mined row.
struct Buffers {
    std::vector<float> floats;
    std::vector<uint32_t> words;
    // (topk,) s / tau; shares of the pass's sum and of Z; soft weight
    std::vector<double> logit, taken, share, weight;
    MinedRow mined{};

    explicit Buffers(const Task& t)
        : words(size_t(round_up(t.topk, kMinedPad))), logit(words.size()), taken(words.size()),
          share(words.size()), weight(words.size()) {
        const size_t k = words.size(), columns = size_t(t.padded);
        floats.resize((k + 2) * columns + 4 * k);
        float* next = floats.data();
        for (float** row : {&mined.query, &mined.seen}) *row = next, next += columns;
        mined.rows = next, next += k * columns;
        for (float** value : {&mined.similarity, &mined.score, &mined.weight, &mined.to_mined})
            *value = next, next += k;
        mined.words = words.data();
    }
};

double log_add(double x, double y) {
    const double top = std::max(x, y);
    return top == -kInfinity ? top : top + std::log1p(std::exp(-std::abs(x - y)));
}

// The mined rows of row i: their slots and noise, then what the kernels compute of them.
void look_up(const FinishArgs& args, const Kernels& kernels, const Task& t, int64_t i,
             MinedRow& m) {
    m.slots = args.pass.topk_index + i * t.topk;
    m.found = std::find(m.slots, m.slots + t.topk, -1) - m.slots;
    if (t.selection == Selection::kBernoulli)
        for (int64_t c = 0; c < m.found; ++c)
            m.words[c] =
                philox_word(t.row_offset + i, t.col_offset + m.slots[c], t.seed, t.offset);
    kernels.read_mined(t, m, args.query, i);
}

void finish_row(const FinishArgs& args, const Kernels& kernels, const Task& t, int64_t i,
                Buffers& buffers) {
    const BankPassArgs& pass = args.pass;
    MinedRow& m = buffers.mined;
    double *logit = buffers.logit.data(), *taken = buffers.taken.data();
    double *share = buffers.share.data(), *weight = buffers.weight.data();
    look_up(args, kernels, t, i, m);
    const double tau = pass.temperature, plus = pass.s_pos[i] / tau;
    const double lse = pass.neg_lse[i], sq_lse = pass.neg_sq_lse[i];

    // The pass summed over the mined rows too: take out those that were kept. What rounding leaves
    // of nothing is nothing.
    double left = pass.neg_count[i], taken_sum = 0, taken_square = 0;
    for (int64_t c = 0; c < m.found; ++c) {
        logit[c] = m.similarity[c] / tau;
        const double keep = m.weight[c], part = keep > 0 ? std::exp(logit[c] - lse) : 0;
        taken[c] = keep * part;
        taken_sum += taken[c];
        taken_square += taken[c] * part;
        left -= keep;
    }
    taken_square *= std::exp(2 * lse - sq_lse);
    const bool none = lse == -kInfinity || taken_sum >= 1 ||
                      (left <= 0 && t.selection != Selection::kExpected);
    const double rest = none ? 1 : 1 - taken_sum;
    const double log_n = none ? -kInfinity : lse + std::log(rest);
    const double log_sq =
        none || taken_square >= 1 ? -kInfinity : sq_lse + std::log(1 - taken_square);

    const double log_h = log_add(plus, log_n);
    double top = log_h, best = -kInfinity;
    for (int64_t c = 0; c < m.found; ++c) {
        top = std::max(top, logit[c]);
        best = std::max(best, double(m.score[c]));
    }
    const bool attention = args.soft_weights == SoftWeights::kAttention;
    double z = std::exp(log_h - top), weights = 0;
    for (int64_t c = 0; c < m.found; ++c) {
        share[c] = std::exp(logit[c] - top);
        z += share[c];
        weight[c] = attention ? std::exp((m.score[c] - best) / args.weight_temperature) : 1;
        weights += weight[c];
    }
    const double log_z = top + std::log(z);
    const double unit = args.soft_weights == SoftWeights::kBinary ? 1 : weights;
    double pull = 1, pulled = 0;
    for (int64_t c = 0; c < m.found; ++c) {
        share[c] /= z;
        weight[c] /= unit;
        pull += weight[c];
        pulled += weight[c] * (log_z - logit[c]);
    }
    args.loss[i] = float(log_z - plus + pulled + args.hard_weight * (log_h - plus));

    // d loss / d s of the key, of all kept negatives together, and of each mined row
    const double force = pull * std::exp(log_h - log_z) + args.hard_weight;  // times exp(s/tau) / H
    const double to_mean = force * std::exp(log_n - log_h) / (rest * tau);
    m.to_mean = float(to_mean);
    m.to_key = float((pull * std::exp(plus - log_z) - 1 +
                      args.hard_weight * (std::exp(plus - log_h) - 1)) / tau);
    for (int64_t c = 0; c < m.found; ++c) {
        double slope = (pull * share[c] - weight[c]) / tau;
        if (!none) slope -= to_mean * taken[c];
        if (attention)
            slope += weight[c] * (log_z - logit[c] - pulled) / args.weight_temperature;
        m.to_mined[c] = float(slope);
    }
    kernels.combine(t, m, args.key, pass.neg_mean, i, args.grad_query);

    // g = exp(s/tau) force / (tau H): its mean and variance over the kept negatives
    const double log_g = std::log(force) - log_h - std::log(tau), kept = std::max(left, 1.0);
    const double mean = std::exp(log_n + log_g) / kept;
    args.stats[i] = float(std::max(left, 0.0));
    args.stats[t.rows + i] = float(mean);
    args.stats[2 * t.rows + i] =
        float(std::max(std::exp(log_sq + 2 * log_g) / kept - mean * mean, 0.0));
}

}  // namespace

void finish(const FinishArgs& args, const std::string& isa, int threads) {
    const Kernels& kernels = choose(isa, args.pass.dtype);
    Task t = make_task(args.pass);
    t.padded = round_up(t.dim, kPad);
    // A thread takes some 30 us to start, a row of five mined ones of 128 columns half a us.
    constexpr double kThreadElements = 1e6;
    const double elements = double(t.rows) * double(t.topk + 4) * double(t.padded);
    threads = int(std::clamp<double>(elements / kThreadElements, 1, threads));
    std::vector<Buffers> buffers;
    for (int i = 0; i < threads; ++i) buffers.emplace_back(t);
    constexpr int64_t kRows = 16;
    std::atomic<int64_t> next{0};
    run_threads(buffers.size(), [&](size_t worker) {
        for (int64_t first; (first = next.fetch_add(kRows)) < t.rows;)
            for (int64_t i = first; i < std::min(first + kRows, t.rows); ++i)
                finish_row(args, kernels, t, i, buffers[worker]);
    });
}

}  // namespace psm::cpu
