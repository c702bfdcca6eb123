// PSM's finish on the CPU: loss, gradient and statistics of each row from its 1 + k positives and
// the sums of a pass. The formulas are those of psm_kernels/functional/psm.py, differentiated by
// hand; the loops over columns are in finish.inl.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "driver.h"

namespace psm::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The memory behind a MinedRow and what else finish_row needs per mined row.
struct Buffers {
    std::vector<float> floats;
    std::vector<double> logit, share, weight;  // (topk,) s / tau; share of Z; soft weight
    MinedRow mined{};

    explicit Buffers(const Task& t)
        : logit(size_t(t.topk)), share(logit.size()), weight(logit.size()) {
        const size_t k = logit.size(), columns = size_t(t.padded);
        floats.resize((k + 2) * columns + 2 * k);
        float* next = floats.data();
        mined.query = next, next += columns;
        mined.scratch = next, next += columns;
        mined.rows = next, next += k * columns;
        mined.similarity = next, next += k;
        mined.to_mined = next;
    }
};

double log_add(double x, double y) {
    const double top = std::max(x, y);
    return top == -kInfinity ? top : top + std::log1p(std::exp(-std::abs(x - y)));
}

void finish_row(const FinishArgs& args, const Kernels& kernels, const Task& t, int64_t i,
                Buffers& buffers) {
    MinedRow& m = buffers.mined;
    double *logit = buffers.logit.data(), *share = buffers.share.data();
    double* weight = buffers.weight.data();
    m.slots = args.topk_index + i * t.topk;
    m.found = std::find(m.slots, m.slots + t.topk, -1) - m.slots;
    kernels.read_mined(t, m, args.query, i);
    const double tau = args.temperature, plus = args.s_pos[i] / tau, log_n = args.neg_lse[i];

    const double log_h = log_add(plus, log_n);
    double top = log_h, best = -kInfinity;
    for (int64_t c = 0; c < m.found; ++c) {
        logit[c] = m.similarity[c] / tau;
        top = std::max(top, logit[c]);
        best = std::max(best, double(m.similarity[c]));
    }
    const bool attention = args.soft_weights == SoftWeights::kAttention;
    double z = std::exp(log_h - top), weights = 0;
    for (int64_t c = 0; c < m.found; ++c) {
        share[c] = std::exp(logit[c] - top);
        z += share[c];
        weight[c] = attention ? std::exp((m.similarity[c] - best) / args.weight_temperature) : 1;
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
    m.to_mean = float(force * std::exp(log_n - log_h) / tau);
    m.to_key = float((pull * std::exp(plus - log_z) - 1 +
                      args.hard_weight * (std::exp(plus - log_h) - 1)) / tau);
    for (int64_t c = 0; c < m.found; ++c) {
        double slope = (pull * share[c] - weight[c]) / tau;
        if (attention)
            slope += weight[c] * (log_z - logit[c] - pulled) / args.weight_temperature;
        m.to_mined[c] = float(slope);
    }
    kernels.combine(t, m, args.key, args.neg_mean, i, args.grad_query);

    // g = exp(s/tau) force / (tau H): its mean and variance over the kept negatives
    const double log_g = std::log(force) - log_h - std::log(tau);
    const double kept = std::max(args.neg_count[i], 1.0f), mean = std::exp(log_n + log_g) / kept;
    args.stats[i] = args.neg_count[i];
    args.stats[t.rows + i] = float(mean);
    args.stats[2 * t.rows + i] =
        float(std::max(std::exp(args.neg_sq_lse[i] + 2 * log_g) / kept - mean * mean, 0.0));
}

}  // namespace

void finish(const FinishArgs& args, const std::string& isa, int threads) {
    const Kernels& kernels = choose(isa, args.dtype);
    Task t{};  // as much of it as the loops over columns read
    t.bank = args.bank, t.dtype = args.dtype;
    t.rows = args.batch, t.topk = args.topk, t.dim = args.dim;
    t.padded = (t.dim + kPad - 1) / kPad * kPad;
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
