// For sm_90a alone: setup.py compiles it for nothing else.
#include "kernels_sm90.cuh"

psm::cuda::PassKernel psm::cuda::sm90_float16(Selection selection, Work work, int dim) {
    return find_sm90<Float16>(selection, work, dim);
}
