// Unit rows as psm_kernels/rows.py makes them, a warp each.
#pragma once

#include "pass.cuh"
#include "reduce.cuh"

namespace psm::cuda {

constexpr int kWarpRowThreads = 256;

template <class T>
PSM_DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        return {uint16_t(pack<T>(x, x))};
    }
}

// What to divide a row by: its norm, from squares in fp64, where those of 1e30 and 1e-30 are still
// numbers. Below the normal fp32 numbers a row counts as zeros and is divided by 1.
template <class T>
PSM_DEVICE float row_norm(const T* row, int dim) {
    double square = 0;
    for (int d = thread_index() % 32; d < dim; d += 32) {
        const double x = to_float(row[d]);
        square += x * x;
    }
    const double norm = square_root(warp_sum(square));
    return norm < 1.17549435e-38 ? 1.0f : float(norm);  // NaN stays
}

// A warp takes row first_row() and those row_step() further on.
PSM_DEVICE int64_t first_row() {
    return (int64_t(block_index()) * kWarpRowThreads + thread_index()) / 32;
}
PSM_DEVICE int64_t row_step() { return int64_t(grid_size()) * (kWarpRowThreads / 32); }

inline int64_t warp_row_grid(int64_t rows) {
    const int64_t blocks = (rows - 1) / (kWarpRowThreads / 32) + 1;
    return blocks < 1024 ? blocks : 1024;
}

}  // namespace psm::cuda
