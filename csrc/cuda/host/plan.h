// How a kernel that walks the bank does its work: which one it is, how it is cut, its launch.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

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

using Find = PassKernel (*)(Selection, Work, int dim);
inline Find portable_kernels(Dtype dtype) {
    return dtype == Dtype::kFloat32    ? sm80_float32
           : dtype == Dtype::kBFloat16 ? sm80_bfloat16
                                       : sm80_float16;
}
inline Find hopper_kernels(Dtype dtype, int device) {  // null where there are none
#ifdef PSM_CUDA_SM90A
    if (dtype != Dtype::kFloat32 && attribute(cudaDevAttrComputeCapabilityMajor, device) == 9)
        return dtype == Dtype::kBFloat16 ? sm90_bfloat16 : sm90_float16;
#endif
    return nullptr;
}

inline PassKernel choose(const KernelArgs& args, Work work, const Place& place) {
    const Selection selection = args.options.selection;
    Find find = nullptr;
    if (args.aligned && selection != Selection::kAffine && !place.force_sm80)
        find = hopper_kernels(args.bank.dtype, place.device);
    if (find == nullptr) find = portable_kernels(args.bank.dtype);
    return find(selection, work, args.dim());
}

// What `make` gives for a key, made once: each call of a backend asks the same twice.
template <class Key, class Make>
int remembered(const Key& key, Make make) {
    static std::mutex mutex;
    static std::map<Key, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    const int value = make();
    if (known.size() > 4096) known.clear();  // batches of ever new sizes
    return known[key] = value;
}

// CTAs of a kernel that a multiprocessor of the current device holds at once.
inline int ask_occupancy(const PassKernel& kernel) {
    load(kernel.function, kernel.name);
    if (kernel.shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kernel.shared_bytes),
              kernel.name);
    int per_multiprocessor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel.function,
                                                        kernel.threads, kernel.shared_bytes),
          kernel.name);
    if (per_multiprocessor == 0)
        throw std::runtime_error(std::string("psm_kernels: ") + kernel.name +
                                 ": does not fit this GPU's shared memory");
    return per_multiprocessor;
}
// Asked once per kernel and device: with its permission to take more than 48 KB of shared memory
// the answer takes microseconds.
inline int resident_blocks(const PassKernel& kernel, int device) {
    return remembered(std::pair(kernel.function, device), [&] { return ask_occupancy(kernel); });
}

// The fewest splits of `grains` that end as early as any, to 1 %, in tiles of `tile_slots`: waves
// of items, each with a tile's time for its rows and its end, and then `partials`, splits x B x D
// sums, written and read again. A tile of 128 rows takes 4 x 128 x tile_slots x D operations, on
// Hopper at 6 TFLOP/s of a multiprocessor; a split's sums are 8 x B x D bytes, in L2 at 5 TB/s.
inline int find_splits(int row_blocks, int resident, int grains, int grain_tiles, int tile_slots,
                       bool partials) {
    const auto end = [&](int splits) {
        const int waves = (row_blocks * splits + resident - 1) / resident;
        const int tiles = (grains + splits - 1) / splits * grain_tiles;
        return waves * (tiles + 1) + partials * 2.4 * row_blocks / tile_slots * splits;
    };
    const int last = std::min({grains, kMaxSplits, std::max(1, 4 * resident / row_blocks)});
    double earliest = end(1);
    for (int splits = 2; splits <= last; ++splits) earliest = std::min(earliest, end(splits));
    int splits = 1;
    while (end(splits) > 1.01 * earliest) ++splits;
    return splits;
}
template <class... Number>
int choose_splits(Number... numbers) {
    return remembered(std::tuple(numbers...), [&] { return find_splits(numbers...); });
}

class Plan {
   public:
    const PassKernel kernel;

    Plan(const KernelArgs& args, Work work, const Call& call)
        : kernel(choose(args, work, call.place)),
          partials_(work != Work::kMine),
          resident_(resident_blocks(kernel, call.place.device) * call.multiprocessors()) {}

    void cut(KernelArgs& args) const {
        const int64_t slots = args.bank.slots + lead_slots(args.options.col_offset);
        const int64_t grain = std::max(group_slots(args), kernel.tile_slots);
        const int grains = int((slots - 1) / grain + 1);
        const int grain_tiles = int(grain / kernel.tile_slots);
        args.row_blocks = int((args.batch + kernel.rows - 1) / kernel.rows);
        args.splits = choose_splits(args.row_blocks, resident_, grains, grain_tiles,
                                    kernel.tile_slots, partials_);
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
    const bool partials_;
    const int resident_;
};

}  // namespace psm::cuda
