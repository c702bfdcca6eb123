// Kernels as handles, which launch.cu can start without seeing their code, and how those who see it
// (kernels_sm80.cuh, kernels_sm90.cuh) find the one that serves a bank.
#pragma once

#include <type_traits>

#include "pass.cuh"

namespace psm::cuda {

struct PassKernel {
    const void* function;
    const char* name;
    int threads, rows, tile_slots, shared_bytes;
    int cell_group = 1;        // see KernelArgs
    bool tensor_maps = false;  // it reads rows by TMA, so they must be aligned to 16 bytes
};

PassKernel sm80_float32(Selection selection, Work work, int dim);
PassKernel sm80_bfloat16(Selection selection, Work work, int dim);
PassKernel sm80_float16(Selection selection, Work work, int dim);
// For GPUs whose blocks can have kLargeShared bytes of shared memory.
constexpr int kLargeShared = 160 << 10;
PassKernel sm80_large_bfloat16(Selection selection, Work work, int dim);
PassKernel sm80_large_float16(Selection selection, Work work, int dim);
PassKernel sm90_bfloat16(Selection selection, Work work, int dim);
PassKernel sm90_float16(Selection selection, Work work, int dim);

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
