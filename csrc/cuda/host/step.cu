// A PSM step: unit rows, the pass, losses with their gradient, in five launches, six where the caller
// hides slots.
#include "../common/hidden.cuh"
#include "../common/step.cuh"

#include "call.h"

namespace psm::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kWarpRowThreads)
    unit_kernel(const __grid_constant__ StepKernelArgs args) {
    unit_rows<T>(args);
}

constexpr int kLossCtas = 6;  // of a multiprocessor: 80 registers; without a word ptxas spills
template <class T>
__global__ void __launch_bounds__(kRowThreads, kLossCtas)
    loss_kernel(const __grid_constant__ StepKernelArgs args,
                const __grid_constant__ KernelArgs pass) {
    __shared__ StepShared shared;
    losses<T>(args, pass, shared);
}

template <class T>
void step_as(const StepArgs& given, Call& call) {
    StepKernelArgs args = {given};
    PassArgs& pass = args.pass;
    const int64_t batch = pass.batch, all = batch * pass.bank.dim;
    const int64_t mined = batch * pass.options.topk;
    args.unit_query = call.take<float>(all), args.unit_key = call.take<float>(all);
    args.norms = call.take<float>(batch), args.s_pos = call.take<float>(batch);
    const bool rounds = sizeof(T) < sizeof(float);
    args.pass_query = rounds ? static_cast<void*>(call.take<T>(all)) : args.unit_query;
    args.pass_key = rounds ? static_cast<void*>(call.take<T>(all)) : args.unit_key;

    pass.query = args.pass_query, pass.key = args.pass_key, pass.s_pos = args.s_pos;
    pass.neg_lse = call.take<float>(batch), pass.neg_mean = call.take<float>(all);
    pass.neg_sq_lse = call.take<float>(batch), pass.neg_count = call.take<float>(batch);
    pass.topk_sim = call.take<float>(mined), pass.topk_index = call.take<int64_t>(mined);
    const bool reduces = args.reduction != Reduction::kNone;
    args.losses = reduces ? call.take<float>(batch) : args.loss;
    args.done = call.take<int>(1);
    const Hidden hidden = room_for_hidden(pass, call);
    args.flags = hidden.flags, args.flag_words = flag_words(hidden, batch);

    call.launch(reinterpret_cast<const void*>(unit_kernel<T>), "unit rows", warp_row_grid(batch),
                kWarpRowThreads, 0, args);
    KernelArgs sums = run_pass(pass, hidden, call);
    call.launch(reinterpret_cast<const void*>(loss_kernel<T>), "losses", row_grid(batch),
                kRowThreads, 0, args, sums);
}

void step(const StepArgs& args, Call& call) {
    if (args.pass.batch == 0) return;
    visit_dtype(args.pass.bank.dtype,
                [&](auto type) { step_as<typename decltype(type)::type>(args, call); });
}

}  // namespace

void load_steps() {
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
        visit_dtype(dtype, [](auto type) {
            using T = typename decltype(type)::type;
            load(reinterpret_cast<const void*>(unit_kernel<T>), "unit rows");
            load(reinterpret_cast<const void*>(loss_kernel<T>), "losses");
        });
}

size_t workspace_bytes(const StepArgs& args, const Place& place) {
    Call call(place, true);
    step(args, call);
    return call.bytes();
}

void psm_step(const StepArgs& args, const Place& place) {
    Call call(place);
    step(args, call);
}

}  // namespace psm::cuda
