// How a kernel that walks the bank does its work: which one it is, how it is cut, its launch.
#pragma once

#include "../common/kernels.h"
#include "../common/merge.cuh"
#include "call.h"
#include "tensor_map.h"

namespace psm::cuda {

inline bool rows_aligned(const PassArgs& args) {
    const int64_t bytes = args.bank.dim * (args.bank.dtype == Dtype::kFloat32 ? 4 : 2);
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
    return bytes % 16 == 0 && at(args.query) == 0 && at(args.key) == 0 && at(args.bank.rows) == 0;
}

inline PassKernel choose(const KernelArgs& args, Work work, const Place& place) {
    const Dtype dtype = args.bank.dtype;
    const Selection selection = args.options.selection;
#ifdef PSM_CUDA_SM90A
    const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor, place.device) == 9;
    if (hopper && args.aligned && selection != Selection::kAffine && !place.force_sm80) {
        if (dtype == Dtype::kBFloat16) return sm90_bfloat16(selection, work, args.dim());
        if (dtype == Dtype::kFloat16) return sm90_float16(selection, work, args.dim());
    }
#endif
    const auto find = dtype == Dtype::kFloat32    ? sm80_float32
                      : dtype == Dtype::kBFloat16 ? sm80_bfloat16
                                                  : sm80_float16;
    return find(selection, work, args.dim());
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

class Plan {
   public:
    const PassKernel kernel;

    Plan(const KernelArgs& args, Work work, const Call& call)
        : kernel(choose(args, work, call.place)) {
        if (kernel.shared_bytes > 48 << 10)  // more needs the kernel's consent
            check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kernel.shared_bytes),
                  kernel.name);
        int per_multiprocessor = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                  &per_multiprocessor, kernel.function, kernel.threads, kernel.shared_bytes),
              kernel.name);
        if (per_multiprocessor == 0)
            throw std::runtime_error(std::string("psm_kernels: ") + kernel.name +
                                     ": does not fit this GPU's shared memory");
        resident_ = per_multiprocessor * call.multiprocessors();
    }

    void cut(KernelArgs& args) const {
        const int64_t slots = args.bank.slots + lead_slots(args.options.col_offset);
        const int64_t grain = std::max(group_slots(args), kernel.tile_slots);
        const int grains = int(std::min<int64_t>(kMaxSplits, (slots - 1) / grain + 1));
        args.row_blocks = int((args.batch + kernel.rows - 1) / kernel.rows);
        args.splits = choose_splits(args.row_blocks, resident_, grains);
    }
    void start(KernelArgs& args, const Call& call) const {
        const int grid = std::min(resident_, args.row_blocks * args.splits);
        const auto launch = [&](auto&... argument) {
            call.launch(kernel.function, kernel.name, grid, kernel.threads, kernel.shared_bytes,
                        argument...);
        };
        if (!kernel.tensor_maps || call.measures) return launch(args);
        const auto map = [&](const void* rows, int64_t count, int box_rows) {
            return tensor_map(rows, args.bank.dtype, count, args.bank.dim, box_rows);
        };
        TensorMaps maps = {map(args.query, args.batch, kernel.rows),
                           map(args.bank.rows, args.bank.slots, kernel.tile_slots)};
        launch(args, maps);
    }

   private:
    int resident_;
};

}  // namespace psm::cuda
