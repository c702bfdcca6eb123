// One step of PSM: unit rows, the pass, then loss and gradient of each row. The formulas are those of
// psm_kernels/losses/psm.py, differentiated by hand.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "pass.h"

namespace psm::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double log_add(double x, double y) {
    const double top = std::max(x, y);
    return top == -kInfinity ? top : top + std::log1p(std::exp(-std::abs(x - y)));
}

// Memory of one thread for the mined rows of one query.
struct Mined {
    float *similarity, *to_mined;    // (topk,)
    double *logit, *weight;          // (topk,)
    float* buffer;                   // (2, padded)
};

// The logits s / tau are relative to that of the key, so that a small loss keeps its digits:
//   H = 1 + the negatives,  Z = H + the mined rows,  both at least 1
//   loss = log Z + sum over the mined rows of weight (log Z - logit) + hard_weight log H
void finish_row(const StepArgs& args, const Pass& pass, const UnitRows& rows, const int64_t* slots,
                const Mined& m, float* mean, float* losses, int64_t i) {
    const Task& t = pass.sums.task;
    const int64_t topk = args.pass.options.topk, found = std::find(slots, slots + topk, -1) - slots;
    const float *query = rows.query + i * t.padded, *key = rows.key + i * t.padded;
    const double tau = args.pass.options.temperature, plus = rows.s_pos[i] / tau;
    const double log_n = merge_sums(pass.kernels, t, i, mean).lse - plus;
    pass.kernels.similarities(t, query, slots, found, m.buffer, m.similarity);

    double top = -kInfinity, best = -kInfinity, mined = 0, weights = 0;
    for (int64_t c = 0; c < found; ++c) {
        m.logit[c] = m.similarity[c] / tau - plus;
        top = std::max(top, m.logit[c]);
        best = std::max(best, double(m.similarity[c]));
    }
    const bool attention = args.soft_weights == SoftWeights::kAttention;
    for (int64_t c = 0; c < found; ++c) {
        mined += std::exp(m.logit[c] - top);
        m.weight[c] = attention ? std::exp((m.similarity[c] - best) / args.weight_temperature) : 1;
        weights += m.weight[c];
    }
    const double log_h = log_add(0, log_n);
    const double log_z = found ? log_add(log_h, top + std::log(mined)) : log_h;
    const double unit = args.soft_weights == SoftWeights::kBinary ? 1 : weights;
    double pull = 1, pulled = 0;
    for (int64_t c = 0; c < found; ++c) {
        m.weight[c] /= unit;
        pull += m.weight[c];
        pulled += m.weight[c] * (log_z - m.logit[c]);
    }
    losses[i] = float(log_z + pulled + args.hard_weight * log_h);

    // d loss / d s of the key, of all kept negatives together, and of each mined row
    const double share = args.reduction == Reduction::kMean ? 1.0 / double(args.pass.batch) : 1.0;
    const double force = pull * std::exp(log_h - log_z) + args.hard_weight;  // times exp(s/tau) / H
    for (int64_t c = 0; c < found; ++c) {
        double slope = (pull * std::exp(m.logit[c] - log_z) - m.weight[c]) / tau;
        if (attention)
            slope += m.weight[c] * (log_z - m.logit[c] - pulled) / args.weight_temperature;
        m.to_mined[c] = float(share * slope);
    }
    const double to_key = pull - 1 + pull * std::expm1(-log_z) +
                          args.hard_weight * std::expm1(-log_h);
    const RowTerms terms{query, key, mean, slots, found, float(share * to_key / tau),
                         float(share * force * std::exp(log_n - log_h) / tau), m.to_mined,
                         rows.norms[i]};
    pass.kernels.gradient(t, terms, m.buffer, args.gradient + i * t.dim);
}

}  // namespace

void psm_step(const StepArgs& step, const std::string& isa, int threads) {
    PassArgs args = step.pass;
    const int64_t batch = args.batch, topk = args.options.topk;
    const int64_t padded = ceil_div(args.bank.dim, kPad) * kPad;
    const bool reduces = step.reduction != Reduction::kNone;
    UnitRows rows{step.query, step.key};
    float* losses = step.loss;
    const Memory before = with_memory([&](Arena& arena) {
        arena.take(rows.query, batch * padded);
        arena.take(rows.key, batch * padded);
        arena.take(rows.norms, batch);
        arena.take(rows.s_pos, batch);
        arena.take(args.topk_index, batch * topk);
        if (reduces) arena.take(losses, batch);
    });
    args.query = rows.query, args.key = rows.key, args.s_pos = rows.s_pos;
    args.neg_mean = step.gradient;  // not null: wanted
    Pass pass(args, isa, threads);
    if (batch == 0) return;
    pass.mining.task.unit = rows.key, pass.sums.task.unit = rows.query;

    std::vector<Mined> mined(pass.threads.used);
    const Memory memory = with_memory([&](Arena& arena) {
        pass.lay_out(arena);
        for (Mined& m : mined) {
            arena.take(m.similarity, topk);
            arena.take(m.to_mined, topk);
            arena.take(m.logit, topk);
            arena.take(m.weight, topk);
            arena.take(m.buffer, 2 * padded);
        }
    });
    pass.run([&](int64_t block) { pass.kernels.unit_rows(pass.sums.task, rows, block); },
             [&](size_t worker, float* mean, int64_t i) {
                 const int64_t* slots = args.topk_index + i * topk;
                 finish_row(step, pass, rows, slots, mined[worker], mean, losses, i);
             });
    if (!reduces) return;
    const double sum = std::accumulate(losses, losses + batch, 0.0);
    *step.loss = float(step.reduction == Reduction::kMean ? sum / double(batch) : sum);
}

}  // namespace psm::cpu
