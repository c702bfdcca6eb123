#include "kernels_sm80.cuh"

namespace psm::cuda {

PassKernel sm80_bfloat16(Selection selection, Work work, int dim) {
    return find_sm80<BFloat16>(selection, work, dim);
}

}  // namespace psm::cuda
