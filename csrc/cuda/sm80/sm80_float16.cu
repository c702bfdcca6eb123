#include "kernels_sm80.cuh"

namespace psm::cuda {

PassKernel sm80_float16(Selection selection, Work work, int dim) {
    return find_sm80<Float16>(selection, work, dim);
}

}  // namespace psm::cuda
