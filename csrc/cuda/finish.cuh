// What PSM makes of a pass, one CTA per row: loss, gradients and statistics of B x (1 + k) numbers
// in one kernel. The formulas are those of psm_kernels/functional/psm.py, differentiated by hand;
// the attention is the query's own.
#pragma once

#include "launch.h"
#include "pass.cuh"

namespace psm::cuda {

constexpr int kFinishThreads = 128;

struct FinishShared {
    float logit[kMaxFinishTopk], score[kMaxFinishTopk];  // query by mined row; for the attention
    float weight[kMaxFinishTopk];
    float of_mined[kMaxFinishTopk], of_key, of_mean;  // what the gradient holds of each vector
};

PSM_DEVICE float log_add(float x, float y) {
    const float top = fmaxf(x, y);
    return top == -INFINITY ? top : top + log1pf(expf(-fabsf(x - y)));
}

template <class T>
PSM_DEVICE void mined_products(const FinishArgs& args, int row, const int64_t* index,
                               FinishShared& shared) {
    const int lane = thread_index() % 32;
    const float* query = args.query + int64_t(row) * args.dim;
    for (int c = thread_index() / 32; c < args.topk; c += kFinishThreads / 32) {
        const int64_t slot = index[c] < 0 ? 0 : index[c];
        const T* mined = static_cast<const T*>(args.bank) + slot * args.dim;
        float similarity = 0;
        for (int d = lane; d < args.dim && index[c] >= 0; d += 32)
            similarity = fmaf(query[d], to_float(mined[d]), similarity);
        for (int mask = 16; mask > 0; mask /= 2) similarity += shuffle_xor(similarity, mask);
        if (lane == 0) {
            shared.logit[c] = similarity / args.temperature;
            shared.score[c] = similarity / args.weight_temperature;
        }
    }
}

// One thread: loss and statistics, and how much of each vector the gradient holds.
PSM_DEVICE void finish_scalars(const FinishArgs& args, int row, const int64_t* index,
                               FinishShared& shared) {
    const float tau = args.temperature, positive = args.s_pos[row] / tau;
    const float log_n = args.neg_lse[row], log_h = log_add(positive, log_n);
    float found = 0, top = -INFINITY;
    for (int c = 0; c < args.topk; ++c) {
        if (index[c] < 0) continue;
        found += 1;
        top = fmaxf(top, shared.score[c]);
    }
    float log_z = log_h, total = 0;
    for (int c = 0; c < args.topk; ++c) {
        if (index[c] < 0) continue;
        log_z = log_add(log_z, shared.logit[c]);
        total += expf(shared.score[c] - top);
    }
    float weights = 1, soft = log_z - positive, pulled = 0;
    for (int c = 0; c < args.topk; ++c) {
        if (index[c] < 0) continue;
        const float weight = args.soft_weights == SoftWeights::kAttention
                                 ? expf(shared.score[c] - top) / total
                                 : args.soft_weights == SoftWeights::kUniform ? 1 / found : 1.0f;
        const float gap = log_z - shared.logit[c];
        weights += weight;
        soft += weight * gap;
        pulled += weight * gap;
        shared.weight[c] = weight;
    }
    args.loss[row] = soft + args.hard_weight * (log_h - positive);

    const float negatives =
        weights * expf(log_n - log_z) + args.hard_weight * expf(log_n - log_h);
    shared.of_mean = negatives / tau;
    shared.of_key = (weights * expf(positive - log_z) - 1 +
                     args.hard_weight * (expf(positive - log_h) - 1)) / tau;
    for (int c = 0; c < args.topk; ++c) {
        if (index[c] < 0) {
            shared.of_mined[c] = 0;
            continue;
        }
        const float weight = shared.weight[c], logit = shared.logit[c];
        float of_mined = (weights * expf(logit - log_z) - weight) / tau;
        if (args.soft_weights == SoftWeights::kAttention)
            of_mined += weight * (log_z - logit - pulled) / args.weight_temperature;
        shared.of_mined[c] = of_mined;
    }

    // g = exp(s / tau) / tau (weights / Z + hard_weight / H): its mean and variance
    const float log_pull =
        log_add(logf(weights) - log_z, logf(args.hard_weight) - log_h) - logf(tau);
    const float count = args.neg_count[row], kept = fmaxf(count, 1.0f);
    const float mean = expf(log_n + log_pull) / kept;
    const float variance = expf(args.neg_sq_lse[row] + 2 * log_pull) / kept - mean * mean;
    const int64_t batch = args.batch;
    args.stats[row] = count;
    args.stats[batch + row] = mean;
    args.stats[2 * batch + row] = fmaxf(variance, 0.0f);
}

template <class T>
PSM_DEVICE void finish_rows(const FinishArgs& args, FinishShared& shared) {
    for (int row = block_index(); row < args.batch; row += grid_size()) {
        const int64_t* index = args.topk_index + int64_t(row) * args.topk;
        mined_products<T>(args, row, index, shared);
        block_sync();
        if (thread_index() == 0) finish_scalars(args, row, index, shared);
        block_sync();
        for (int d = thread_index(); d < args.dim; d += kFinishThreads) {
            const int64_t at = int64_t(row) * args.dim + d;
            float gradient = shared.of_key * args.key[at];
            if (shared.of_mean != 0) gradient = fmaf(shared.of_mean, args.neg_mean[at], gradient);
            for (int c = 0; c < args.topk; ++c) {
                if (index[c] < 0) continue;
                const float m = to_float(static_cast<const T*>(args.bank)[index[c] * args.dim + d]);
                gradient = fmaf(shared.of_mined[c], m, gradient);
            }
            args.grad_query[at] = gradient;
        }
        block_sync();  // the next row overwrites shared memory
    }
}

}  // namespace psm::cuda
