// A kernel that walks the bank: which one serves a request, how it is cut into work, its launch.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "merge.cuh"
#include "runtime.h"
#include "tensor_map.h"

namespace psm::cuda {

inline bool rows_aligned(const BankPassArgs& pass) {
    const int64_t bytes = pass.dim * (pass.dtype == Dtype::kFloat32 ? 4 : 2);
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
    return bytes % 16 == 0 && at(pass.query) == 0 && at(pass.key) == 0 && at(pass.bank) == 0;
}

struct Chosen {
    PassKernel kernel;
    bool tensor_maps;
};

inline Chosen choose(const Request& request, Work work) {
    const BankPassArgs& pass = request.pass;
    const int dim = int(pass.dim);
#ifdef PSM_CUDA_SM90A
    const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor, request.device) == 9;
    const bool affine = pass.selection == Selection::kAffine;
    if (hopper && rows_aligned(pass) && !affine && !request.force_sm80) {
        if (pass.dtype == Dtype::kBFloat16)
            return {sm90_bfloat16(pass.selection, work, dim), true};
        if (pass.dtype == Dtype::kFloat16) return {sm90_float16(pass.selection, work, dim), true};
    }
#endif
    const auto find = pass.dtype == Dtype::kFloat32    ? sm80_float32
                      : pass.dtype == Dtype::kBFloat16 ? sm80_bfloat16
                                                       : sm80_float16;
    return {find(pass.selection, work, dim), false};
}

// The fewest splits that fill nearly all multiprocessors in every wave: partial results cost
// splits x B x D of traffic.
inline int choose_splits(int row_blocks, int resident, int most) {
    int best = 1;
    double best_share = 0;
    const int last = std::min(most, std::max(1, 2 * resident / row_blocks));
    for (int splits = 1; splits <= last; ++splits) {
        const int items = row_blocks * splits, waves = (items + resident - 1) / resident;
        const double share = double(items) / (double(waves) * resident);
        if (share > best_share + 0.03) best = splits, best_share = share;
    }
    return best;
}

class Sweep {
   public:
    Sweep(const Request& request, Work work)
        : request_(request), chosen_(choose(request, work)), kernel_(chosen_.kernel) {
        if (kernel_.shared_bytes > 48 << 10)  // more needs the kernel's consent
            check(cudaFuncSetAttribute(kernel_.function,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kernel_.shared_bytes),
                  kernel_.name);
        int per_multiprocessor = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                  &per_multiprocessor, kernel_.function, kernel_.threads, kernel_.shared_bytes),
              kernel_.name);
        if (per_multiprocessor == 0)
            throw std::runtime_error(std::string("psm_kernels: ") + kernel_.name +
                                     ": does not fit this GPU's shared memory");
        resident_ = per_multiprocessor * attribute(cudaDevAttrMultiProcessorCount, request.device);
    }
    const PassKernel& kernel() const { return kernel_; }

    void cut(PassArgs& pass, int64_t batch) const {
        const int64_t slots = pass.slots + lead_slots(pass.col_offset);
        const int64_t grain = std::max(group_slots(pass), kernel_.tile_slots);
        const int grains = int(std::min<int64_t>(kMaxSplits, (slots - 1) / grain + 1));
        pass.batch = int(batch);
        pass.row_blocks = (pass.batch + kernel_.rows - 1) / kernel_.rows;
        pass.splits = choose_splits(pass.row_blocks, resident_, grains);
    }
    void start(PassArgs& pass) const {
        TensorMaps maps;
        void* arguments[] = {&pass, &maps};
        if (chosen_.tensor_maps) {
            const auto map = [&](const void* rows, int64_t count, int box_rows) {
                return tensor_map(rows, request_.pass.dtype, count, pass.dim, box_rows);
            };
            maps.query = map(pass.query, pass.batch, kernel_.rows);
            maps.bank = map(pass.bank, pass.slots, kernel_.tile_slots);
        }
        const int grid = std::min(resident_, pass.row_blocks * pass.splits);
        launch(kernel_.function, kernel_.name, grid, kernel_.threads, kernel_.shared_bytes,
               request_.stream, arguments);
    }

   private:
    const Request& request_;
    const Chosen chosen_;
    const PassKernel& kernel_;
    int resident_;
};

}  // namespace psm::cuda
