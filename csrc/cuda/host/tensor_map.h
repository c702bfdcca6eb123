// Tensor maps for TMA. The driver's encoder is found at run time: nothing but cudart is linked.
#pragma once

#include <cudaTypedefs.h>

#include "../common/tile.cuh"
#include "../sm90/primitives_sm90.cuh"
#include "runtime.h"

namespace psm::cuda {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found),
              "cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("psm_kernels: this driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return encoder;
}

// Boxes of `box_rows` rows by one panel of 64 16-bit columns; outside the matrix they read as zero.
inline TensorMap tensor_map(const void* base, Dtype dtype, int64_t rows, int64_t columns,
                            int box_rows) {
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
    TensorMap map;
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t pitch[1] = {cuuint64_t(columns) * 2};  // bytes
    const cuuint32_t box[2] = {kPanelColumns, cuuint32_t(box_rows)}, steps[2] = {1, 1};
    const CUresult result = tensor_map_encoder()(
        reinterpret_cast<CUtensorMap*>(&map),
        dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2, const_cast<void*>(base), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("psm_kernels: cuTensorMapEncodeTiled: error " +
                                 std::to_string(int(result)));
    return map;
}

}  // namespace psm::cuda
