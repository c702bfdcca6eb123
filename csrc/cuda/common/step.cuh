// Around the pass of a PSM step: unit rows before it, a warp each, and after it, where the splits
// are merged, the loss and its gradient, a CTA per row. The formulas are those of
// psm_kernels/losses/psm.py, differentiated by hand; the attention is the query's own.
#pragma once

#include "limits.h"
#include "merge.cuh"
#include "rows.cuh"

namespace psm::cuda {

struct StepKernelArgs : StepArgs {  // `pass` is whole: what it reads and writes lies in workspace
    float *unit_query, *unit_key;   // (B, D)
    void *pass_query, *pass_key;    // (B, D) in the bank's dtype: the same arrays, if that is fp32
    float *norms, *s_pos;           // (B,) of the queries, 1 where they are zeros; of the pass
    float* losses;                  // (B,)
    uint32_t* flags;                // what the first kernel clears for the pass
    int64_t flag_words;
    int* done;                      // () CTAs of the last kernel
};

template <class T>
PSM_DEVICE void unit_rows(const StepKernelArgs& args) {
    const int lane = thread_index() % 32, dim = int(args.pass.bank.dim);
    const int64_t thread = int64_t(block_index()) * kWarpRowThreads + thread_index();
    for (int64_t at = thread; at < args.flag_words; at += int64_t(grid_size()) * kWarpRowThreads)
        args.flags[at] = 0;
    if (thread == 0) *args.done = 0;
    for (int64_t row = first_row(); row < args.pass.batch; row += row_step()) {
        const float *query = args.query + row * dim, *key = args.key + row * dim;
        const float query_norm = row_norm(query, dim), key_norm = row_norm(key, dim);
        float similarity = 0;
        for (int d = lane; d < dim; d += 32) {
            const float q = query[d] / query_norm, k = key[d] / key_norm;
            const int64_t at = row * dim + d;
            args.unit_query[at] = q, args.unit_key[at] = k;
            similarity = fmaf(q, k, similarity);
            if constexpr (sizeof(T) < 4) {
                static_cast<T*>(args.pass_query)[at] = from_float<T>(q);
                static_cast<T*>(args.pass_key)[at] = from_float<T>(k);
            }
        }
        similarity = warp_sum(similarity);
        if (lane != 0) continue;
        args.norms[row] = query_norm;
        args.s_pos[row] = similarity;
    }
}

struct StepShared {
    float gap[kMaxStepTopk];    // of mined rows, s / tau less that of the positive
    float score[kMaxStepTopk];  // of the attention; then the weights
    float of_mined[kMaxStepTopk], of_key, of_mean;  // what the gradient holds of each vector
    MergeShared merge;
    bool last;  // CTA of the grid
};

template <class T>
PSM_DEVICE void mined_products(const StepKernelArgs& args, int row, const int64_t* index,
                               StepShared& shared) {
    const int lane = thread_index() % 32, dim = int(args.pass.bank.dim);
    const float* query = args.unit_query + int64_t(row) * dim;
    for (int c = thread_index() / 32; c < args.pass.options.topk; c += kRowThreads / 32) {
        if (index[c] < 0) continue;
        const T* mined = static_cast<const T*>(args.pass.bank.rows) + index[c] * dim;
        float similarity = 0;
        for (int d = lane; d < dim; d += 32)
            similarity = fmaf(query[d], to_float(mined[d]), similarity);
        similarity = warp_sum(similarity);
        if (lane == 0) {
            shared.gap[c] = (similarity - args.s_pos[row]) / args.pass.options.temperature;
            shared.score[c] = similarity / args.weight_temperature;
        }
    }
}

// log(1 + sum of exp(gap)), from the largest of the gaps and 0 and from the sum of exp(gap - top).
// As a difference of two logarithms a small loss would lose its digits.
PSM_DEVICE float log1p_sum(float top, float sum) {
    return top > 0 ? top + logf(expf(-top) + sum) : log1pf(sum);
}

// One thread: the loss, and how much of each vector its gradient holds. Logits count from the
// positive's: Z = 1 + exp(negatives) + the sum of exp(gap), H = 1 + exp(negatives).
PSM_DEVICE void step_scalars(const StepKernelArgs& args, int row, const int64_t* index,
                             StepShared& shared) {
    const int topk = int(args.pass.options.topk);
    const float tau = args.pass.options.temperature, hard = args.hard_weight;
    const float negatives = args.pass.neg_lse[row] - args.s_pos[row] / tau;
    float found = 0, top = fmaxf(negatives, 0.0f), top_score = -INFINITY;
    const float log_h = log1p_sum(top, expf(negatives - top));
    for (int c = 0; c < topk; ++c) {
        if (index[c] < 0) continue;
        found += 1;
        top = fmaxf(top, shared.gap[c]);
        top_score = fmaxf(top_score, shared.score[c]);
    }
    float sum = expf(negatives - top), total = 0;
    for (int c = 0; c < topk; ++c) {
        if (index[c] < 0) continue;
        sum += expf(shared.gap[c] - top);
        total += expf(shared.score[c] - top_score);
    }
    const float log_z = log1p_sum(top, sum);
    const bool attends = args.soft_weights == SoftWeights::kAttention;
    const float same = args.soft_weights == SoftWeights::kUniform ? 1 / found : 1.0f;
    float mined_weights = 0, pulled = 0;
    for (int c = 0; c < topk; ++c) {
        if (index[c] < 0) continue;
        const float weight = attends ? expf(shared.score[c] - top_score) / total : same;
        shared.score[c] = weight;
        mined_weights += weight;
        pulled += weight * (log_z - shared.gap[c]);
    }
    args.losses[row] = log_z + pulled + hard * log_h;

    const float weights = 1 + mined_weights;
    shared.of_mean = (weights * expf(negatives - log_z) + hard * expf(negatives - log_h)) / tau;
    shared.of_key = (mined_weights + weights * expm1f(-log_z) + hard * expm1f(-log_h)) / tau;
    for (int c = 0; c < topk; ++c) {
        if (index[c] < 0) continue;
        const float gap = shared.gap[c], weight = shared.score[c];
        float of_mined = (weights * expf(gap - log_z) - weight) / tau;
        if (attends) of_mined += weight * (log_z - gap - pulled) / args.weight_temperature;
        shared.of_mined[c] = of_mined;
    }
}

PSM_DEVICE float share_of_row(const StepKernelArgs& args) {
    return args.reduction == Reduction::kMean ? 1.0f / float(args.pass.batch) : 1.0f;
}

// The last CTA that is done adds the losses, in an order that does not depend on which one it is.
PSM_DEVICE void reduce_losses(const StepKernelArgs& args, StepShared& shared) {
    if (args.reduction == Reduction::kNone) return;
    if (thread_index() == 0) shared.last = count_in(args.done) == grid_size() - 1;
    block_sync();
    if (!shared.last) return;
    float sum = 0;
    for (int64_t row = thread_index(); row < args.pass.batch; row += kRowThreads)
        sum += args.losses[row];
    sum = block_sum(sum, shared.merge.values);
    if (thread_index() == 0) *args.loss = sum * share_of_row(args);
}

// The part of the gradient along a unit row does nothing to the row before its normalization; the
// rest counts per length.
template <class T>
PSM_DEVICE void losses(const StepKernelArgs& args, const KernelArgs& pass, StepShared& shared) {
    const int dim = int(args.pass.bank.dim), topk = int(args.pass.options.topk);
    const float share = share_of_row(args);
    for (int row = block_index(); row < args.pass.batch; row += grid_size()) {
        const int64_t* index = args.pass.topk_index + int64_t(row) * topk;
        mined_products<T>(args, row, index, shared);
        merge_row<T>(pass, row, shared.merge);
        if (thread_index() == 0) step_scalars(args, row, index, shared);
        block_sync();
        const int64_t first = int64_t(row) * dim;
        float along = 0;
        for (int d = thread_index(); d < dim; d += kRowThreads) {
            const float mean = args.pass.neg_mean[first + d];
            float gradient = fmaf(shared.of_mean, mean, shared.of_key * args.unit_key[first + d]);
            for (int c = 0; c < topk; ++c) {
                if (index[c] < 0) continue;
                const T* mined = static_cast<const T*>(args.pass.bank.rows) + index[c] * dim;
                gradient = fmaf(shared.of_mined[c], to_float(mined[d]), gradient);
            }
            args.gradient[first + d] = gradient;
            along = fmaf(gradient, args.unit_query[first + d], along);
        }
        along = block_sum(along, shared.merge.values);
        for (int d = thread_index(); d < dim; d += kRowThreads) {
            float& gradient = args.gradient[first + d];
            gradient = share * fmaf(-along, args.unit_query[first + d], gradient) / args.norms[row];
        }
        block_sync();  // the next row overwrites shared memory
    }
    reduce_losses(args, shared);
}

}  // namespace psm::cuda
