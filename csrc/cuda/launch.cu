// Plans a pass over the bank, gets workspace, starts the kernels.
#include "launch.h"

#include <algorithm>

#include "kernels.h"
#include "merge.cuh"
#include "runtime.h"
#include "tensor_map.h"

namespace psm::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeArgs args) {
    __shared__ MergeShared shared;
    merge_rows<T>(args, shared);
}

const void* find_merge(Dtype dtype) {
    if (dtype == Dtype::kFloat32) return reinterpret_cast<const void*>(merge_kernel<float>);
    if (dtype == Dtype::kBFloat16) return reinterpret_cast<const void*>(merge_kernel<BFloat16>);
    return reinterpret_cast<const void*>(merge_kernel<Float16>);
}

struct Chosen {
    PassKernel kernel;
    bool tensor_maps;
};

Chosen choose(const Request& request, bool aligned) {
    const BankPassArgs& pass = request.pass;
    const int dim = int(pass.dim);
    const Work work = !request.sums            ? Work::kMine
                      : request.null_epilogue ? Work::kProducts
                                              : Work::kPass;
#ifdef PSM_CUDA_SM90A
    const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor, request.device) == 9;
    if (hopper && aligned && !request.force_sm80 && work != Work::kMine) {
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
int choose_splits(int row_blocks, int resident, int most) {
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

// Cuts one allocation into aligned arrays; called with null to find its size.
class Cutter {
   public:
    explicit Cutter(void* start) : start_(static_cast<char*>(start)) {}
    template <class V>
    V* take(int64_t count) {
        V* array = start_ == nullptr ? nullptr : reinterpret_cast<V*>(start_ + bytes_);
        bytes_ += (size_t(count) * sizeof(V) + 255) / 256 * 256;
        return array;
    }
    size_t bytes() const { return bytes_; }

   private:
    char* start_;
    size_t bytes_ = 0;
};

size_t lay_out(MergeArgs& args, bool sums, int merge_grid, void* workspace) {
    Cutter cutter(workspace);
    PassArgs& pass = args.pass;
    const int64_t rows = int64_t(pass.splits) * pass.batch;
    const int64_t chosen = chosen_cells(args.topk, pass.cells);
    if (sums) {
        pass.sums = cutter.take<RowSums>(rows);
        pass.means = cutter.take<float>(rows * pass.dim);
    }
    if (pass.mine) {
        pass.cell_max = cutter.take<float>(int64_t(pass.batch + 1) * pass.cells);
        args.cell_keys = cutter.take<uint64_t>(int64_t(merge_grid) * power_of_two(int(chosen)));
        args.slot_keys = cutter.take<uint64_t>(int64_t(merge_grid) * power_of_two(args.topk));
        args.scores = cutter.take<float>(int64_t(merge_grid) * chosen << pass.cell_log2);
    }
    return cutter.bytes();
}

bool rows_aligned(const BankPassArgs& pass) {
    const int64_t bytes = pass.dim * (pass.dtype == Dtype::kFloat32 ? 4 : 2);
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
    return bytes % 16 == 0 && at(pass.query) == 0 && at(pass.key) == 0 && at(pass.bank) == 0;
}

}  // namespace

void bank_pass(const Request& request, const Allocate& allocate) {
    const BankPassArgs& in = request.pass;
    if (in.batch == 0) return;
    const DeviceGuard guard(request.device);
    const bool aligned = rows_aligned(in);
    const Chosen chosen = choose(request, aligned);
    const PassKernel& kernel = chosen.kernel;
    if (kernel.shared_bytes > 48 << 10)  // more needs the kernel's consent
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
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, request.device);
    const int resident = multiprocessors * per_multiprocessor;

    MergeArgs args = {};
    PassArgs& pass = args.pass;
    pass.query = in.query, pass.key = in.key, pass.bank = in.bank;
    pass.count = request.count, pass.s_pos = in.s_pos, pass.rng_state = request.rng_state;
    pass.slots = request.slots;
    pass.row_offset = in.row_offset, pass.col_offset = in.col_offset;
    pass.batch = int(in.batch), pass.dim = int(in.dim);
    pass.selection = in.selection;
    pass.mine = in.topk > 0;
    pass.aligned = aligned;
    pass.scale = float(1.4426950408889634 / in.temperature);
    pass.sharpness = sharpness_of(in.a);
    pass.b = in.b;
    pass.cell_log2 = kCellLog2;
    const int64_t last = request.slots + lead_slots(in.col_offset) - 1;
    while ((last >> pass.cell_log2) >= kMaxCells) ++pass.cell_log2;
    pass.cells = room_for_cells(last, pass.cell_log2);
    pass.row_blocks = (pass.batch + kernel.rows - 1) / kernel.rows;
    const int64_t grain = std::max(1 << pass.cell_log2, kernel.tile_slots);
    const int grains = int(std::min<int64_t>(kMaxSplits, last / grain + 1));
    pass.splits = choose_splits(pass.row_blocks, resident, grains);

    args.topk = int(in.topk);
    args.neg_lse = in.neg_lse, args.neg_mean = in.neg_mean;
    args.neg_sq_lse = in.neg_sq_lse, args.neg_count = in.neg_count;
    args.topk_sim = in.topk_sim, args.topk_index = in.topk_index;
    const int merge_grid = std::min(pass.batch, 4 * multiprocessors);
    const size_t bytes = lay_out(args, request.sums, merge_grid, nullptr);
    lay_out(args, request.sums, merge_grid, allocate(bytes));

    TensorMaps maps;
    void* pass_arguments[] = {&pass, &maps};
    if (chosen.tensor_maps) {
        maps.query = tensor_map(pass.query, in.dtype, pass.batch, pass.dim, kernel.rows);
        maps.key = pass.mine ? tensor_map(pass.key, in.dtype, pass.batch, pass.dim, kernel.rows)
                             : maps.query;
        maps.bank = tensor_map(pass.bank, in.dtype, pass.slots, pass.dim, kernel.tile_slots);
    }
    const int grid = std::min(resident, pass.row_blocks * pass.splits);
    launch(kernel.function, kernel.name, grid, kernel.threads, kernel.shared_bytes, request.stream,
           pass_arguments);
    void* merge_arguments[] = {&args};
    launch(find_merge(in.dtype), "merge", merge_grid, kMergeThreads, 0, request.stream,
           merge_arguments);
}

std::string unavailable(int device) {
    cudaFuncAttributes attributes;
    try {
        const DeviceGuard guard(device);
        check(cudaFuncGetAttributes(&attributes, find_merge(Dtype::kFloat32)), "no kernel here");
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

}  // namespace psm::cuda
