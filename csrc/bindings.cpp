// psm_kernels._C: addresses and sizes in, no tensors. psm_kernels/ops/cpp.py is the caller that
// knows torch; the checks here turn a wrong address or size into an exception instead of a crash.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "bank_pass.h"
#include "cpu/bank_pass_cpu.h"

namespace py = pybind11;

#ifdef PSM_CUDA
namespace psm::cuda {
void bind(py::module_& parent);  // csrc/cuda/bindings.cpp
}
#endif

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& want) {
    throw std::invalid_argument(name + ": got " + got + ", wanted " + want);
}

void check_size(const char* name, int64_t size, int64_t least, int64_t most) {
    if (size < least || size > most)
        refuse(name, std::to_string(size),
               "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
}

void check_temperature(const char* name, double value) {
    if (value > 0.0 && !std::isinf(value)) return;
    refuse(name, std::to_string(value), "a number above 0");
}

template <class T>
T* pointer(const char* name, uintptr_t address, int64_t elements, size_t size) {
    if (elements > 0 && address == 0) refuse(name, "a null pointer", "an address");
    if (address % size != 0)
        refuse(name, "address " + std::to_string(address),
               "a multiple of " + std::to_string(size));
    return reinterpret_cast<T*>(address);
}

template <class T>
T* pointer(const char* name, uintptr_t address, int64_t elements) {
    return pointer<T>(name, address, elements, sizeof(T));
}

constexpr int64_t kMaxSize = int64_t(1) << 40;  // of any product of two sizes: no overflow below

struct Sizes {
    psm::Dtype dtype;
    size_t element;  // bytes
};

Sizes check_sizes(int64_t batch, int64_t count, int64_t dim, int64_t topk, int dtype,
                  int threads) {
    check_size("dtype", dtype, 0, 2);
    check_size("dim", dim, 1, psm::kMaxDim);
    check_size("batch", batch, 0, kMaxSize / dim);
    check_size("count", count, 0, psm::kMaxCount);
    check_size("topk", topk, 0, kMaxSize / std::max<int64_t>(batch, 1));
    check_size("threads", threads, 1, 4096);
    return {psm::Dtype(dtype), dtype == 0 ? 4u : 2u};
}

psm::Exclude check_exclude(uintptr_t slots, int64_t listed, uintptr_t ids, uintptr_t bank_ids,
                           int64_t batch, int64_t count) {
    check_size("listed", listed, 0, kMaxSize / std::max<int64_t>(batch, 1));
    return {pointer<int64_t>("exclude", slots, batch * listed), listed,
            pointer<int64_t>("ids", ids, bank_ids ? batch : 0),
            pointer<int64_t>("bank_ids", bank_ids, ids ? count : 0)};
}

template <class Args>
void run(const Args& args, const std::string& isa, int threads, const py::function& allocate) {
    const size_t bytes = psm::cpu::workspace_bytes(args, isa, threads);
    void* workspace = pointer<char>("workspace", allocate(bytes).cast<uintptr_t>(), 1);
    py::gil_scoped_release release;
    psm::cpu::run(args, isa, threads, workspace);
}

void bank_pass(uintptr_t query, uintptr_t key, uintptr_t bank, uintptr_t s_pos, int64_t batch,
               int64_t count, int64_t dim, int dtype, int selection, double temperature, double a,
               double b, int64_t topk, int64_t seed, int64_t offset, int64_t row_offset,
               int64_t col_offset, uintptr_t affine, uintptr_t rho, uintptr_t exclude,
               int64_t listed, uintptr_t ids, uintptr_t bank_ids, bool exclude_mined,
               uintptr_t neg_lse, uintptr_t neg_mean, uintptr_t neg_sq_lse, uintptr_t neg_count,
               uintptr_t topk_sim, uintptr_t topk_index, const std::string& isa, int threads,
               const py::function& allocate) {
    const Sizes sizes = check_sizes(batch, count, dim, topk, dtype, threads);
    check_size("selection", selection, 0, 3);
    check_temperature("temperature", temperature);
    psm::BankPassArgs args{};
    args.query = pointer<void>("query", query, batch, sizes.element);
    args.key = pointer<void>("key", key, topk ? batch : 0, sizes.element);
    args.bank = pointer<void>("bank", bank, count, sizes.element);
    args.s_pos = pointer<float>("s_pos", s_pos, batch);
    args.batch = batch, args.count = count, args.dim = dim;
    args.dtype = sizes.dtype, args.selection = psm::Selection(selection);
    args.temperature = float(temperature), args.a = float(a), args.b = float(b);
    args.topk = topk, args.seed = uint64_t(seed), args.offset = uint64_t(offset);
    args.row_offset = row_offset, args.col_offset = col_offset;
    const bool weighs = args.selection == psm::Selection::kAffine;
    args.affine = pointer<float>("affine", affine, weighs ? batch : 0);
    args.rho = pointer<float>("rho", rho, weighs ? count : 0);
    args.exclude = check_exclude(exclude, listed, ids, bank_ids, batch, count);
    args.exclude_mined = exclude_mined;
    args.neg_lse = pointer<float>("neg_lse", neg_lse, batch);
    args.neg_mean = pointer<float>("neg_mean", neg_mean, 0);  // null: not wanted
    args.neg_sq_lse = pointer<float>("neg_sq_lse", neg_sq_lse, batch);
    args.neg_count = pointer<float>("neg_count", neg_count, batch);
    args.topk_sim = pointer<float>("topk_sim", topk_sim, batch * topk);
    args.topk_index = pointer<int64_t>("topk_index", topk_index, batch * topk);
    run(args, isa, threads, allocate);
}

void bank_topk(uintptr_t query, uintptr_t bank, int64_t batch, int64_t count, int64_t dim,
               int dtype, int64_t topk, uintptr_t exclude, int64_t listed, uintptr_t ids,
               uintptr_t bank_ids, uintptr_t topk_sim, uintptr_t topk_index,
               const std::string& isa, int threads, const py::function& allocate) {
    const Sizes sizes = check_sizes(batch, count, dim, topk, dtype, threads);
    psm::BankTopkArgs args{};
    args.query = pointer<void>("query", query, batch, sizes.element);
    args.bank = pointer<void>("bank", bank, count, sizes.element);
    args.batch = batch, args.count = count, args.dim = dim;
    args.dtype = sizes.dtype, args.topk = topk;
    args.exclude = check_exclude(exclude, listed, ids, bank_ids, batch, count);
    args.topk_sim = pointer<float>("topk_sim", topk_sim, batch * topk);
    args.topk_index = pointer<int64_t>("topk_index", topk_index, batch * topk);
    run(args, isa, threads, allocate);
}

void psm_finish(uintptr_t query, uintptr_t key, uintptr_t bank, uintptr_t s_pos, uintptr_t neg_lse,
                uintptr_t neg_mean, uintptr_t neg_sq_lse, uintptr_t neg_count, uintptr_t topk_index,
                int64_t batch, int64_t slots, int64_t dim, int dtype, double temperature,
                int64_t topk, int soft_weights, double weight_temperature, double hard_weight,
                uintptr_t loss, uintptr_t grad_query, uintptr_t stats, const std::string& isa,
                int threads) {
    const Sizes sizes = check_sizes(batch, slots, dim, topk, dtype, threads);
    check_size("soft_weights", soft_weights, 0, 2);
    check_temperature("temperature", temperature);
    check_temperature("weight_temperature", weight_temperature);
    psm::cpu::FinishArgs args{};
    args.query = pointer<float>("query", query, batch);
    args.key = pointer<float>("key", key, batch);
    args.bank = pointer<void>("bank", bank, slots, sizes.element);
    args.s_pos = pointer<float>("s_pos", s_pos, batch);
    args.neg_lse = pointer<float>("neg_lse", neg_lse, batch);
    args.neg_mean = pointer<float>("neg_mean", neg_mean, batch);
    args.neg_sq_lse = pointer<float>("neg_sq_lse", neg_sq_lse, batch);
    args.neg_count = pointer<float>("neg_count", neg_count, batch);
    args.topk_index = pointer<int64_t>("topk_index", topk_index, batch * topk);
    for (int64_t i = 0; i < batch * topk; ++i)
        check_size("topk_index", args.topk_index[i], -1, slots - 1);
    args.batch = batch, args.dim = dim, args.topk = topk, args.dtype = sizes.dtype;
    args.temperature = float(temperature);
    args.soft_weights = psm::SoftWeights(soft_weights);
    args.weight_temperature = float(weight_temperature), args.hard_weight = float(hard_weight);
    args.loss = pointer<float>("loss", loss, batch);
    args.grad_query = pointer<float>("grad_query", grad_query, batch);
    args.stats = pointer<float>("stats", stats, batch);
    py::gil_scoped_release release;
    psm::cpu::finish(args, isa, threads);
}

void unit_pair(uintptr_t query, uintptr_t key, uintptr_t unit_query, uintptr_t unit_key,
               uintptr_t norms, uintptr_t s_pos, int64_t batch, int64_t dim) {
    check_sizes(batch, 0, dim, 0, 0, 1);
    psm::cpu::UnitPair pair{};
    pair.query = pointer<float>("query", query, batch);
    pair.key = pointer<float>("key", key, batch);
    pair.unit_query = pointer<float>("unit_query", unit_query, batch);
    pair.unit_key = pointer<float>("unit_key", unit_key, batch);
    pair.norms = pointer<float>("norms", norms, batch);
    pair.s_pos = pointer<float>("s_pos", s_pos, batch);
    pair.batch = batch, pair.dim = dim;
    py::gil_scoped_release release;
    psm::cpu::unit_pair(pair);
}

void through_norm(uintptr_t unit, uintptr_t norms, int64_t batch, int64_t dim,
                  uintptr_t gradient) {
    check_sizes(batch, 0, dim, 0, 0, 1);
    const float* rows = pointer<float>("unit", unit, batch);
    const float* lengths = pointer<float>("norms", norms, batch);
    float* target = pointer<float>("gradient", gradient, batch);
    py::gil_scoped_release release;
    psm::cpu::through_norm(rows, lengths, batch, dim, target);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of psm_kernels on raw addresses; use psm_kernels.ops.";
    m.attr("source_id") = PSM_SOURCE_ID;  // what ops/cpp.py compares with the package
    m.def("instruction_sets", &psm::cpu::instruction_sets, "What this machine runs, best first.");
    using py::arg;
    m.def("bank_pass", &bank_pass, py::kw_only(), arg("query"), arg("key"), arg("bank"),
          arg("s_pos"), arg("batch"), arg("count"), arg("dim"), arg("dtype"), arg("selection"),
          arg("temperature"), arg("a"), arg("b"), arg("topk"), arg("seed"), arg("offset"),
          arg("row_offset"), arg("col_offset"), arg("affine"), arg("rho"), arg("exclude"),
          arg("listed"), arg("ids"), arg("bank_ids"), arg("exclude_mined"), arg("neg_lse"),
          arg("neg_mean"), arg("neg_sq_lse"), arg("neg_count"), arg("topk_sim"),
          arg("topk_index"), arg("isa"), arg("threads"), arg("allocate"));
    m.def("bank_topk", &bank_topk, py::kw_only(), arg("query"), arg("bank"), arg("batch"),
          arg("count"), arg("dim"), arg("dtype"), arg("topk"), arg("exclude"), arg("listed"),
          arg("ids"), arg("bank_ids"), arg("topk_sim"), arg("topk_index"), arg("isa"),
          arg("threads"), arg("allocate"));
    m.def("psm_finish", &psm_finish, py::kw_only(), arg("query"), arg("key"), arg("bank"),
          arg("s_pos"), arg("neg_lse"), arg("neg_mean"), arg("neg_sq_lse"), arg("neg_count"),
          arg("topk_index"), arg("batch"), arg("slots"), arg("dim"), arg("dtype"),
          arg("temperature"), arg("topk"), arg("soft_weights"), arg("weight_temperature"),
          arg("hard_weight"), arg("loss"), arg("grad_query"), arg("stats"), arg("isa"),
          arg("threads"));
    m.def("unit_pair", &unit_pair, py::kw_only(), arg("query"), arg("key"), arg("unit_query"),
          arg("unit_key"), arg("norms"), arg("s_pos"), arg("batch"), arg("dim"));
    m.def("through_norm", &through_norm, py::kw_only(), arg("unit"), arg("norms"), arg("batch"),
          arg("dim"), arg("gradient"));
#ifdef PSM_CUDA
    psm::cuda::bind(m);
#endif
}
