// Which kernel serves which bank: block sizes by dtype and padded D. Shared memory stays below the
// 99 KB that a block of sm_86, 89 and 120 can have.
#pragma once

#include <type_traits>

#include "mine_sm90.cuh"
#include "pass_fp32.cuh"
#include "pass_sm80.cuh"
#include "pass_sm90.cuh"

namespace psm::cuda {

template <class T>
struct Sm80 {  // rows 16 x warps, slots of a tile, stages
    using Dim64 = PassSm80<T, 64, 8, 64, 4>;
    using Dim128 = PassSm80<T, 128, 8, 64, 4>;
    using Dim256 = PassSm80<T, 256, 4, 32, 4>;
    using Dim512 = PassSm80<T, 512, 4, 16, 2>;
};
template <>
struct Sm80<float> {
    using Dim64 = PassFp32<64, 4, 32, 3>;
    using Dim128 = PassFp32<128, 4, 32, 3>;
    using Dim256 = PassFp32<256, 4, 32, 2>;
    using Dim512 = PassFp32<512, 4, 16, 2>;
};

template <class T>
struct Sm90 {  // slots of a tile, stages: up to 224 KB of the 227 KB of an sm_90 block
    using Dim64 = PassSm90<T, 64, 128, 6>;
    using Dim128 = PassSm90<T, 128, 128, 6>;
    using Dim256 = PassSm90<T, 256, 64, 5>;
};

// Calls visit(Type<configuration>) for the smallest padded D that holds `dim`.
template <class Family, class Visit>
auto visit_pass(int dim, Visit visit) {
    if (dim <= 64) return visit(Type<typename Family::Dim64>{});
    if (dim <= 128) return visit(Type<typename Family::Dim128>{});
    return visit(Type<typename Family::Dim256>{});
}
template <class Family, class Visit>
auto visit_mine(int dim, Visit visit) {
    if (dim <= 256) return visit_pass<Family>(dim, visit);
    return visit(Type<typename Family::Dim512>{});
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
