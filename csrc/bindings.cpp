// psm_kernels._C: the structs of args.h as classes, with addresses as integers, and the functions
// that take them. psm_kernels/backends/compiled.py is the caller that knows torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/driver/cpu.h"
#include "cpu/driver/processor.h"

namespace py = pybind11;

#ifdef PSM_CUDA
namespace psm::cuda {
void bind(py::module_& parent);  // csrc/cuda/host/bindings.cpp
}
#endif

namespace {

// How Python sees a field: an enum as an int, a pointer as the address.
template <class Value>
auto to_python(const Value& value) {
    if constexpr (std::is_pointer_v<Value>)
        return reinterpret_cast<uintptr_t>(value);
    else if constexpr (std::is_enum_v<Value>)
        return int(value);
    else
        return value;
}
template <class Value>
Value from_python(py::handle value) {
    if constexpr (std::is_pointer_v<Value>)
        return reinterpret_cast<Value>(value.cast<uintptr_t>());
    else if constexpr (std::is_enum_v<Value>)
        return Value(value.cast<int>());
    else
        return value.cast<Value>();
}

// A struct as a class: T(name=value, ...), and each field as an attribute.
template <class T>
class Struct {
  public:
    Struct(py::module_& m, const char* name) : class_(m, name, py::module_local()) {
        class_.def(py::init([](const py::kwargs& values) {
            T made;
            for (const auto& [name, value] : values) set(made, name, value);
            return made;
        }));
    }

    template <class Value>
    Struct& field(const char* name, Value T::* member) {
        const Put put = [member](T& self, py::handle value) {
            self.*member = from_python<Value>(value);
        };
        class_.def_property(name, [member](const T& self) { return to_python(self.*member); }, put);
        puts().emplace_back(PyUnicode_InternFromString(name), put);
        return *this;
    }

  private:
    using Put = std::function<void(T&, py::handle)>;

    // Not through the attributes, which would take three times as long.
    static void set(T& made, py::handle name, py::handle value) {
        PyObject* interned = name.inc_ref().ptr();
        PyUnicode_InternInPlace(&interned);
        const auto key = py::reinterpret_steal<py::object>(interned);
        for (const auto& [own, put] : puts()) {
            if (own != key.ptr()) continue;
            try {
                return put(made, value);
            } catch (const py::cast_error&) {
                throw py::type_error(std::string(py::str(name)) + ": got " +
                                     std::string(py::repr(value)) + ", of a type that it is not");
            }
        }
        throw py::type_error("there is no field '" + std::string(py::str(name)) + "'");
    }
    static auto& puts() {
        static std::vector<std::pair<PyObject*, Put>> all;
        return all;
    }

    py::class_<T> class_;
};

void bind_structs(py::module_& m) {
    using namespace psm;
    Struct<PassOptions>(m, "PassOptions")
        .field("temperature", &PassOptions::temperature)
        .field("a", &PassOptions::a)
        .field("b", &PassOptions::b)
        .field("selection", &PassOptions::selection)
        .field("topk", &PassOptions::topk)
        .field("exclude_mined", &PassOptions::exclude_mined)
        .field("row_offset", &PassOptions::row_offset)
        .field("col_offset", &PassOptions::col_offset);
    Struct<Bank>(m, "Bank")
        .field("rows", &Bank::rows)
        .field("slots", &Bank::slots)
        .field("dim", &Bank::dim)
        .field("dtype", &Bank::dtype)
        .field("count", &Bank::count);
    Struct<Exclude>(m, "Exclude")
        .field("slots", &Exclude::slots)
        .field("listed", &Exclude::listed)
        .field("ids", &Exclude::ids)
        .field("bank_ids", &Exclude::bank_ids);
    Struct<PassArgs>(m, "PassArgs")
        .field("options", &PassArgs::options)
        .field("bank", &PassArgs::bank)
        .field("exclude", &PassArgs::exclude)
        .field("batch", &PassArgs::batch)
        .field("query", &PassArgs::query)
        .field("key", &PassArgs::key)
        .field("s_pos", &PassArgs::s_pos)
        .field("rng_state", &PassArgs::rng_state)
        .field("affine", &PassArgs::affine)
        .field("rho", &PassArgs::rho)
        .field("neg_lse", &PassArgs::neg_lse)
        .field("neg_mean", &PassArgs::neg_mean)
        .field("neg_sq_lse", &PassArgs::neg_sq_lse)
        .field("neg_count", &PassArgs::neg_count)
        .field("topk_sim", &PassArgs::topk_sim)
        .field("topk_index", &PassArgs::topk_index);
    Struct<StepArgs>(m, "StepArgs")
        .field("pass_", &StepArgs::pass)
        .field("query", &StepArgs::query)
        .field("key", &StepArgs::key)
        .field("soft_weights", &StepArgs::soft_weights)
        .field("weight_temperature", &StepArgs::weight_temperature)
        .field("hard_weight", &StepArgs::hard_weight)
        .field("reduction", &StepArgs::reduction)
        .field("loss", &StepArgs::loss)
        .field("gradient", &StepArgs::gradient);
    Struct<EnqueueArgs>(m, "EnqueueArgs")
        .field("bank", &EnqueueArgs::bank)
        .field("keys", &EnqueueArgs::keys)
        .field("key_dtype", &EnqueueArgs::key_dtype)
        .field("batch", &EnqueueArgs::batch)
        .field("labels", &EnqueueArgs::labels)
        .field("ids", &EnqueueArgs::ids)
        .field("bank_labels", &EnqueueArgs::bank_labels)
        .field("bank_ids", &EnqueueArgs::bank_ids)
        .field("ptr", &EnqueueArgs::ptr)
        .field("rng_state", &EnqueueArgs::rng_state);
}

// A function of csrc/cpu as Python calls it.
template <class Args, class Result>
auto checked(Result (*run)(const Args&, const std::string&, int)) {
    return [run](const Args& args, const std::string& isa, int threads) {
        psm::check(args, psm::cpu::kLimits);
        psm::check_size("threads", threads, 1, 4096);
        py::gil_scoped_release release;
        return run(args, isa, threads);
    };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of psm_kernels on raw addresses; use psm_kernels.ops.";
    m.attr("source_id") = PSM_SOURCE_ID;  // what backends/compiled.py compares with the package
    bind_structs(m);
    m.attr("max_dim") = psm::cpu::kLimits.dim;
    using py::arg;
    m.def("instruction_sets", &psm::cpu::instruction_sets, "What this machine runs, newest first.");
    m.def("products", &psm::cpu::products, arg("isa"), "What an instruction set multiplies.");
    Struct<psm::cpu::Processor>(m, "Processor")
        .field("isa", &psm::cpu::Processor::isa)
        .field("why", &psm::cpu::Processor::why);
    m.def("processor", &psm::cpu::processor, "What is fastest on this machine.");
    m.def("choose_for", &psm::cpu::choose_for, arg("vendor"), arg("family"), arg("model"));
    m.def("l2_bytes", &psm::cpu::l2_bytes, "The cache that tiles are cut for.");
    m.def("bank_pass", checked(&psm::cpu::bank_pass), arg("args"), arg("isa"), arg("threads"));
    m.def("psm_step", checked(&psm::cpu::psm_step), arg("args"), arg("isa"), arg("threads"));
    m.def("enqueue", checked(&psm::cpu::enqueue), arg("args"), arg("isa"), arg("threads"));
    m.def("workspace_bytes", checked(&psm::cpu::workspace_bytes), arg("args"), arg("isa"),
          arg("threads"));
#ifdef PSM_CUDA
    psm::cuda::bind(m);
#endif
}
