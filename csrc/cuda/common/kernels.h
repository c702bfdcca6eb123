// Kernels as handles that launch.cu can start without seeing their code.
#pragma once

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
PassKernel sm90_bfloat16(Selection selection, Work work, int dim);
PassKernel sm90_float16(Selection selection, Work work, int dim);

}  // namespace psm::cuda
