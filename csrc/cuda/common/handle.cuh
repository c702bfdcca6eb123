// From a bank's properties to the kernel that serves it; kernels_sm80.cuh and kernels_sm90.cuh hold
// the kernels.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace psm::cuda {

extern __shared__ __align__(1024) char dynamic_shared[];

template <class Config, class Function>
PassKernel handle(Function* function, const char* name) {
    return {reinterpret_cast<const void*>(function), name, Config::kThreads, Config::kRows,
            Config::kTileSlots, Config::kSharedBytes};
}

// Calls visit(Type<configuration>) for the smallest padded D that holds `dim`.
template <class Family, class Visit>
auto visit_width(int dim, Visit visit) {
    if (dim <= 64) return visit(Type<typename Family::Dim64>{});
    if (dim <= 128) return visit(Type<typename Family::Dim128>{});
    return visit(Type<typename Family::Dim256>{});
}

template <class Visit>
auto visit_selection(Selection selection, Visit visit) {
    if (selection == Selection::kBernoulli)
        return visit(std::integral_constant<Selection, Selection::kBernoulli>{});
    if (selection == Selection::kExpected)
        return visit(std::integral_constant<Selection, Selection::kExpected>{});
    return visit(std::integral_constant<Selection, Selection::kAll>{});
}

}  // namespace psm::cuda
