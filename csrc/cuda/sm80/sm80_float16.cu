#include "kernels_sm80.cuh"

psm::cuda::PassKernel psm::cuda::sm80_float16(Selection selection, Work work, int dim) {
    return find_sm80<Sm80<Float16>>(selection, work, dim);
}
psm::cuda::PassKernel psm::cuda::sm80_large_float16(Selection selection, Work work, int dim) {
    return find_sm80<Sm80Large<Float16>>(selection, work, dim);
}
