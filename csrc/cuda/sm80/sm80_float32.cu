#include "kernels_sm80.cuh"

psm::cuda::PassKernel psm::cuda::sm80_float32(Selection selection, Work work, int dim) {
    return find_sm80<Sm80<float>>(selection, work, dim);
}
