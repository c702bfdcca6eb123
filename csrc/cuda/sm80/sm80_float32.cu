#include "kernels_sm80.cuh"

namespace psm::cuda {

PassKernel sm80_float32(Selection selection, Work work, int dim) {
    return find_sm80<float>(selection, work, dim);
}

}  // namespace psm::cuda
