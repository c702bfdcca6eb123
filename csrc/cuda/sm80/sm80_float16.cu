#include "kernels_sm80.cuh"

psm::cuda::PassKernel psm::cuda::sm80_float16(Selection selection, Work work, int dim) {
    return find_sm80<Float16>(selection, work, dim);
}
