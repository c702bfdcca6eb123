// psm_kernels._C.cuda: structs with addresses of a device in. psm_kernels/backends/cuda.py is the
// caller that knows torch.
#include <pybind11/pybind11.h>

#include "../../check.h"
#include "launch.h"

namespace py = pybind11;

namespace psm::cuda {

namespace {

Limits limits(int dim, int topk) {
    return {(1 << 30) - 1, (int64_t(1) << 31) - 4096, dim, topk};
}
void check_here(const PassArgs& args) {
    check(args, limits(args.query != nullptr ? kMaxDim : kMaxTopkDim, 1 << 30));
    check_size("slots", args.bank.slots, 1, args.bank.slots);
    if (args.options.selection == Selection::kAffine)  // its kernels do not mine
        check_size("topk", args.options.topk, 0, 0);
}
void check_here(const StepArgs& args) {
    check(args, limits(kMaxDim, kMaxStepTopk));
    check_size("slots", args.pass.bank.slots, 1, args.pass.bank.slots);
}
void check_here(const EnqueueArgs& args) { check(args, limits(INT32_MAX, 0)); }

// A function of launch.h as Python calls it; nothing waits for the device.
template <class Args, class Result>
void bind_call(py::module_& m, const char* name, Result (*run)(const Args&, const Place&)) {
    using py::arg;
    m.def(
        name,
        [run](const Args& args, int device, uintptr_t stream, uintptr_t workspace,
              bool null_epilogue, bool force_sm80, bool ping_pong, int cell_log2) {
            check_here(args);
            check_size("cell_log2", cell_log2, 0, 20);
            const auto address = [](uintptr_t at) { return reinterpret_cast<void*>(at); };
            return run(args, {device, address(stream), address(workspace), null_epilogue,
                              force_sm80, ping_pong, cell_log2});
        },
        arg("args"), arg("device"), arg("stream") = 0, arg("workspace") = 0, py::kw_only(),
        arg("null_epilogue") = false, arg("force_sm80") = false, arg("ping_pong") = false,
        arg("cell_log2") = 0);
}

}  // namespace

void bind(py::module_& parent) {
    py::module_ m = parent.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
    m.attr("built_for") = PSM_CUDA_BUILT_FOR;
    m.attr("max_dim") = kMaxDim;
    m.attr("max_topk_dim") = kMaxTopkDim;
    m.attr("max_step_topk") = kMaxStepTopk;
    m.def("unavailable", &unavailable, "Empty, or why this device cannot run the kernels.");
    bind_call<PassArgs, size_t>(m, "workspace_bytes", &workspace_bytes);
    bind_call<StepArgs, size_t>(m, "workspace_bytes", &workspace_bytes);
    bind_call<PassArgs, void>(m, "bank_pass", &bank_pass);
    bind_call<StepArgs, void>(m, "psm_step", &psm_step);
    bind_call<EnqueueArgs, void>(m, "enqueue", &enqueue);
}

}  // namespace psm::cuda
