#include "kernels_sm80.cuh"

psm::cuda::PassKernel psm::cuda::sm80_bfloat16(Selection selection, Work work, int dim) {
    return find_sm80<Sm80<BFloat16>>(selection, work, dim);
}
psm::cuda::PassKernel psm::cuda::sm80_large_bfloat16(Selection selection, Work work, int dim) {
    return find_sm80<Sm80Large<BFloat16>>(selection, work, dim);
}
