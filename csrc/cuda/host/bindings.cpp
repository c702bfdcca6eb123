// psm_kernels._C.cuda: device addresses, sizes and a stream in. psm_kernels/ops/cuda.py is the
// caller that knows torch.
#include <pybind11/pybind11.h>

#include "launch.h"

namespace py = pybind11;

namespace psm::cuda {

namespace {

template <class V>
V* address(uintptr_t value) {
    return reinterpret_cast<V*>(value);
}

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                    ", wanted an integer in [" + std::to_string(least) + ", " +
                                    std::to_string(most) + "]");
}

void bind_bank_pass(uintptr_t query, uintptr_t key, uintptr_t bank, uintptr_t count,
                    uintptr_t s_pos, uintptr_t rng_state, int64_t batch, int64_t slots, int64_t dim,
                    int dtype, int selection, double temperature, double a, double b, int64_t topk,
                    int64_t row_offset, int64_t col_offset, bool sums, bool null_epilogue,
                    bool force_sm80, int cell_log2, uintptr_t neg_lse, uintptr_t neg_mean,
                    uintptr_t neg_sq_lse, uintptr_t neg_count, uintptr_t topk_sim,
                    uintptr_t topk_index, int device, uintptr_t stream,
                    const py::function& allocate, uintptr_t affine, uintptr_t rho,
                    uintptr_t exclude, int64_t listed, uintptr_t ids, uintptr_t bank_ids,
                    bool exclude_mined) {
    check_range("batch", batch, 0, (1 << 30) - 1);
    check_range("slots", slots, 1, (int64_t(1) << 31) - 4096);
    check_range("dim", dim, 1, sums ? kMaxDim : kMaxTopkDim);
    check_range("topk", topk, 0, 1 << 30);
    check_range("listed", listed, 0, exclude == 0 ? 0 : 1 << 30);
    check_range("bank_ids", bank_ids != 0, ids != 0, ids != 0);
    check_range("cell_log2", cell_log2, 0, 20);
    check_range("dtype", dtype, 0, 2);
    check_range("selection", selection, 0, affine == 0 || rho == 0 || topk > 0 ? 2 : 3);
    Request request = {};
    BankPassArgs& pass = request.pass;
    pass.query = address<void>(query), pass.key = address<void>(key);
    pass.bank = address<void>(bank), pass.s_pos = address<float>(s_pos);
    pass.batch = batch, pass.dim = dim, pass.topk = topk;
    pass.dtype = Dtype(dtype), pass.selection = Selection(selection);
    pass.temperature = float(temperature), pass.a = float(a), pass.b = float(b);
    pass.row_offset = row_offset, pass.col_offset = col_offset;
    pass.affine = address<float>(affine), pass.rho = address<float>(rho);
    pass.exclude = {address<int64_t>(exclude), listed, address<int64_t>(ids),
                    address<int64_t>(bank_ids)};
    pass.exclude_mined = exclude_mined;
    pass.neg_lse = address<float>(neg_lse), pass.neg_mean = address<float>(neg_mean);
    pass.neg_sq_lse = address<float>(neg_sq_lse), pass.neg_count = address<float>(neg_count);
    pass.topk_sim = address<float>(topk_sim), pass.topk_index = address<int64_t>(topk_index);
    request.count = address<int64_t>(count), request.rng_state = address<int64_t>(rng_state);
    request.slots = slots, request.sums = sums;
    request.null_epilogue = null_epilogue, request.force_sm80 = force_sm80;
    request.cell_log2 = cell_log2;
    request.device = device, request.stream = address<void>(stream);
    bank_pass(request, [&](size_t bytes) {
        return address<void>(allocate(bytes).cast<uintptr_t>());
    });
}

void bind_enqueue(uintptr_t keys, uintptr_t labels, uintptr_t ids, uintptr_t bank,
                  uintptr_t bank_labels, uintptr_t bank_ids, uintptr_t ptr, uintptr_t count,
                  uintptr_t ticket, int64_t batch, int64_t slots, int64_t dim, int key_dtype,
                  int bank_dtype, int device, uintptr_t stream) {
    check_range("key_dtype", key_dtype, 0, 2);
    check_range("bank_dtype", bank_dtype, 0, 2);
    enqueue({address<void>(keys), address<int64_t>(labels), address<int64_t>(ids),
             address<void>(bank), address<int64_t>(bank_labels), address<int64_t>(bank_ids),
             address<int64_t>(ptr), address<int64_t>(count), address<int32_t>(ticket), batch,
             slots, dim, Dtype(key_dtype), Dtype(bank_dtype), device, address<void>(stream)});
}

void bind_finish(uintptr_t query, uintptr_t key, uintptr_t bank, uintptr_t s_pos,
                 uintptr_t neg_lse, uintptr_t neg_mean, uintptr_t neg_sq_lse, uintptr_t neg_count,
                 uintptr_t topk_index, int batch, int dim, int topk, int soft_weights,
                 double temperature, double weight_temperature, double hard_weight, uintptr_t loss,
                 uintptr_t grad_query, uintptr_t stats, int dtype, int device, uintptr_t stream) {
    check_range("dtype", dtype, 0, 2);
    check_range("soft_weights", soft_weights, 0, 2);
    check_range("topk", topk, 0, kMaxFinishTopk);
    using F = float;
    finish({address<F>(query), address<F>(key), address<void>(bank), address<F>(s_pos),
            address<F>(neg_lse), address<F>(neg_mean), address<F>(neg_sq_lse),
            address<F>(neg_count), address<int64_t>(topk_index), batch, dim, topk,
            SoftWeights(soft_weights), float(temperature), float(weight_temperature),
            float(hard_weight), address<F>(loss), address<F>(grad_query), address<F>(stats)},
           Dtype(dtype), device, address<void>(stream));
}

}  // namespace

void bind(py::module_& parent) {
    py::module_ m = parent.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
    m.attr("built_for") = PSM_CUDA_BUILT_FOR;
    m.attr("max_dim") = kMaxDim;
    m.attr("max_topk_dim") = kMaxTopkDim;
    m.attr("max_finish_topk") = kMaxFinishTopk;
    m.def("unavailable", &unavailable, "Empty, or why this device cannot run the kernels.");
    using py::arg;
    m.def("bank_pass", &bind_bank_pass, py::kw_only(), arg("query"), arg("key"), arg("bank"),
          arg("count"), arg("s_pos"), arg("rng_state"), arg("batch"), arg("slots"), arg("dim"),
          arg("dtype"), arg("selection"), arg("temperature"), arg("a"), arg("b"), arg("topk"),
          arg("row_offset"), arg("col_offset"), arg("sums"), arg("null_epilogue"),
          arg("force_sm80"), arg("cell_log2"), arg("neg_lse"), arg("neg_mean"), arg("neg_sq_lse"),
          arg("neg_count"), arg("topk_sim"), arg("topk_index"), arg("device"), arg("stream"),
          arg("allocate"), arg("affine") = 0, arg("rho") = 0, arg("exclude") = 0,
          arg("listed") = 0, arg("ids") = 0, arg("bank_ids") = 0, arg("exclude_mined") = false);
    m.def("finish", &bind_finish, py::kw_only(), arg("query"), arg("key"), arg("bank"),
          arg("s_pos"), arg("neg_lse"), arg("neg_mean"), arg("neg_sq_lse"), arg("neg_count"),
          arg("topk_index"), arg("batch"), arg("dim"), arg("topk"), arg("soft_weights"),
          arg("temperature"), arg("weight_temperature"), arg("hard_weight"), arg("loss"),
          arg("grad_query"), arg("stats"), arg("dtype"), arg("device"), arg("stream"));
    m.def("enqueue", &bind_enqueue, py::kw_only(), arg("keys"), arg("labels"), arg("ids"),
          arg("bank"), arg("bank_labels"), arg("bank_ids"), arg("ptr"), arg("count"),
          arg("ticket"), arg("batch"), arg("slots"), arg("dim"), arg("key_dtype"),
          arg("bank_dtype"), arg("device"), arg("stream"));
}

}  // namespace psm::cuda
