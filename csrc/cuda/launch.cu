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
    const bool affine = pass.selection == Selection::kAffine;
    if (hopper && aligned && !affine && !request.force_sm80) {
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

constexpr int64_t kMineBytes = int64_t(128) << 20;

const void* offset(const void* start, int64_t bytes) {
    return start == nullptr ? nullptr : static_cast<const char*>(start) + bytes;
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
    const int64_t chosen = chosen_cells(args.topk, pass.cells, pass);
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
    pass.affine = in.affine, pass.rho = in.rho;
    pass.slots = request.slots;
    pass.row_offset = in.row_offset, pass.col_offset = in.col_offset;
    pass.dim = int(in.dim);
    pass.selection = in.selection;
    pass.mine = in.topk > 0;
    pass.aligned = aligned;
    pass.scale = float(1.4426950408889634 / in.temperature);
    pass.sharpness = sharpness_of(in.a);
    pass.b = in.b;
    pass.cell_group = kernel.cell_group;
    const int64_t slots = request.slots + lead_slots(in.col_offset);
    pass.cell_log2 = std::max(request.cell_log2,
                              choose_cell_log2(in.topk, in.dim, slots, kernel.cell_group));
    pass.cells = room_for_cells(slots, kernel.tile_slots, pass);
    const int64_t grain = std::max(group_slots(pass), kernel.tile_slots);
    const int grains = int(std::min<int64_t>(kMaxSplits, (slots - 1) / grain + 1));
    args.topk = int(in.topk);

    // bank_topk takes so many rows at a time that their maxima keep to kMineBytes.
    const int64_t most = kMineBytes / (int64_t(pass.cells) * 4) / kernel.rows * kernel.rows;
    const int64_t step = request.sums ? in.batch : std::max<int64_t>(most, kernel.rows);
    const auto take_rows = [&](int64_t first) {
        pass.batch = int(std::min(step, in.batch - first));
        pass.row_blocks = (pass.batch + kernel.rows - 1) / kernel.rows;
        pass.splits = choose_splits(pass.row_blocks, resident, grains);
        return std::min(pass.batch, 4 * multiprocessors);  // CTAs of the merge
    };
    const size_t bytes = lay_out(args, request.sums, take_rows(0), nullptr);
    void* workspace = allocate(bytes);
    for (int64_t first = 0; first < in.batch; first += step) {
        const int merge_grid = take_rows(first);
        lay_out(args, request.sums, merge_grid, workspace);
        pass.key = offset(in.key, first * in.dim * (in.dtype == Dtype::kFloat32 ? 4 : 2));
        args.neg_lse = in.neg_lse, args.neg_mean = in.neg_mean;
        args.neg_sq_lse = in.neg_sq_lse, args.neg_count = in.neg_count;
        args.topk_sim = in.topk_sim + first * in.topk;
        args.topk_index = in.topk_index + first * in.topk;
        TensorMaps maps;
        void* pass_arguments[] = {&pass, &maps};
        if (chosen.tensor_maps) {
            const auto map = [&](const void* rows, int64_t count, int box_rows) {
                return tensor_map(rows, in.dtype, count, pass.dim, box_rows);
            };
            maps.bank = map(pass.bank, pass.slots, kernel.tile_slots);
            if (request.sums) maps.query = map(pass.query, pass.batch, kernel.rows);
            if (pass.mine) maps.key = map(pass.key, pass.batch, kernel.rows);
        }
        const int grid = std::min(resident, pass.row_blocks * pass.splits);
        launch(kernel.function, kernel.name, grid, kernel.threads, kernel.shared_bytes,
               request.stream, pass_arguments);
        void* merge_arguments[] = {&args};
        launch(find_merge(in.dtype), "merge", merge_grid, kMergeThreads, 0, request.stream,
               merge_arguments);
    }
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
