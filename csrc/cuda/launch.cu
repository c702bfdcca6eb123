// Plans a pass over the bank, gets workspace, starts the kernels: what is hidden is marked, the mined
// slots are found and, where wanted, marked too, and then the rest is summed. Nothing is summed that
// would have to be subtracted again.
#include "launch.h"

#include <algorithm>

#include "kernels.h"
#include "merge.cuh"
#include "runtime.h"
#include "tensor_map.h"

namespace psm::cuda {

namespace {

bool rows_aligned(const BankPassArgs& pass) {
    const int64_t bytes = pass.dim * (pass.dtype == Dtype::kFloat32 ? 4 : 2);
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
    return bytes % 16 == 0 && at(pass.query) == 0 && at(pass.key) == 0 && at(pass.bank) == 0;
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    mined_kernel(const __grid_constant__ MinedArgs args) {
    __shared__ SelectScratch scratch;
    mine_rows<T>(args, scratch);
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeArgs args) {
    __shared__ MergeShared shared;
    merge_rows<T>(args, shared);
}

__global__ void __launch_bounds__(kMarkThreads) mark_kernel(const __grid_constant__ MarkArgs args) {
    __shared__ MarkShared shared;
    mark_lists(args);
    if (args.pass.hidden.ids != nullptr) mark_ids(args, shared);
}

template <class Visit>
const void* by_dtype(Dtype dtype, Visit visit) {
    if (dtype == Dtype::kFloat32) return visit(Type<float>{});
    if (dtype == Dtype::kBFloat16) return visit(Type<BFloat16>{});
    return visit(Type<Float16>{});
}
const void* find_mined(Dtype dtype) {
    return by_dtype(dtype, [](auto type) {
        return reinterpret_cast<const void*>(mined_kernel<typename decltype(type)::type>);
    });
}
const void* find_merge(Dtype dtype) {
    return by_dtype(dtype, [](auto type) {
        return reinterpret_cast<const void*>(merge_kernel<typename decltype(type)::type>);
    });
}

struct Chosen {
    PassKernel kernel;
    bool tensor_maps;
};

Chosen choose(const Request& request, Work work) {
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

constexpr int64_t kMineBytes = int64_t(128) << 20;  // of cell maxima: more rows take turns

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

// One kernel over the bank: how it is cut into work, and its launch.
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

// CTAs of the kernels that take a row or some slots at a time.
int small_grid(const Request& request, int64_t most) {
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, request.device);
    return int(std::min<int64_t>(most, 4 * multiprocessors));
}

// What the rows of all kernels have in common.
PassArgs common(const Request& request) {
    const BankPassArgs& in = request.pass;
    PassArgs pass = {};
    pass.query = in.query, pass.bank = in.bank;
    pass.count = request.count, pass.s_pos = in.s_pos, pass.rng_state = request.rng_state;
    pass.affine = in.affine, pass.rho = in.rho;
    pass.slots = request.slots;
    pass.row_offset = in.row_offset, pass.col_offset = in.col_offset;
    pass.batch = int(in.batch), pass.dim = int(in.dim);
    pass.selection = in.selection;
    pass.aligned = rows_aligned(in);
    pass.scale = float(1.4426950408889634 / in.temperature);
    pass.sharpness = sharpness_of(in.a);
    pass.b = in.b;
    pass.cell_group = 1;
    return pass;
}

// --- what is hidden ---

// Has the caller hidden anything?
bool hides(const Request& request) {
    const Exclude& exclude = request.pass.exclude;
    return exclude.listed > 0 || exclude.ids != nullptr;
}

size_t lay_out(Hidden& hidden, const Request& request, void* workspace) {
    Cutter cutter(workspace);
    const int64_t slots = request.slots + lead_slots(request.pass.col_offset);
    const int64_t groups = (request.pass.batch + 127) / 128 * 8;  // of whole blocks of rows
    hidden.words = int((slots + 32 * kFlagSlots - 1) / (32 * kFlagSlots));
    hidden.flags = cutter.take<uint32_t>(groups * hidden.words);
    hidden.list = cutter.take<int>(request.pass.batch * hidden.listed);
    return cutter.bytes();
}

// Clears the flags and marks what the caller hides.
void mark(const Request& request, const Hidden& hidden) {
    const size_t bytes = reinterpret_cast<char*>(hidden.list) - reinterpret_cast<char*>(hidden.flags);
    check(cudaMemsetAsync(hidden.flags, 0, bytes, static_cast<cudaStream_t>(request.stream)),
          "cudaMemsetAsync");
    if (!hides(request)) return;
    MarkArgs args = {common(request), request.pass.exclude};
    args.pass.hidden = hidden;
    const int64_t work = std::max(request.slots, request.pass.batch * hidden.listed);
    void* arguments[] = {&args};
    launch(reinterpret_cast<const void*>(mark_kernel), "mark",
           small_grid(request, work / kMarkThreads + 1), kMarkThreads, 0, request.stream, arguments);
}

// --- mining ---

size_t lay_out(MinedArgs& args, int grid, void* workspace) {
    Cutter cutter(workspace);
    const PassArgs& pass = args.pass;
    const int64_t chosen = chosen_cells(args.topk, pass.cells, pass);
    args.pass.cell_max = cutter.take<float>(int64_t(pass.batch + 1) * pass.cells);
    args.cell_keys = cutter.take<uint64_t>(int64_t(grid) * power_of_two(int(chosen)));
    args.slot_keys = cutter.take<uint64_t>(int64_t(grid) * power_of_two(args.topk));
    args.scores = cutter.take<float>(int64_t(grid) * chosen << pass.cell_log2);
    return cutter.bytes();
}

Hidden from_row(Hidden hidden, int64_t row) {
    if (hidden.flags == nullptr) return hidden;
    hidden.flags += row / kFlagRows * hidden.words;
    hidden.list += row * hidden.listed;
    if (hidden.ids != nullptr) hidden.ids += row;
    return hidden;
}

// Called without a workspace it starts nothing and says how much it needs.
size_t mine(const Request& request, const Hidden& seen, const Hidden& next, void* workspace) {
    const BankPassArgs& in = request.pass;
    const Sweep sweep(request, Work::kMine);
    const PassKernel& kernel = sweep.kernel();
    MinedArgs args = {common(request)};
    PassArgs& pass = args.pass;
    const int64_t slots = request.slots + lead_slots(in.col_offset);
    pass.cell_group = kernel.cell_group;
    pass.cell_log2 = std::max(request.cell_log2,
                              choose_cell_log2(in.topk, in.dim, slots, kernel.cell_group));
    pass.cells = room_for_cells(slots, kernel.tile_slots, pass);
    args.topk = int(in.topk);
    const int64_t most = kMineBytes / (int64_t(pass.cells) * 4) / kernel.rows * kernel.rows;
    const int64_t step = std::max<int64_t>(most, kernel.rows);
    const int64_t row_bytes = in.dim * (in.dtype == Dtype::kFloat32 ? 4 : 2);
    for (int64_t first = 0; first < in.batch; first += step) {
        sweep.cut(pass, std::min(step, in.batch - first));
        const int grid = small_grid(request, pass.batch);
        const size_t bytes = lay_out(args, grid, workspace);
        if (workspace == nullptr) return bytes;
        pass.query = static_cast<const char*>(in.key) + first * row_bytes;
        pass.hidden = from_row(seen, first), args.next = from_row(next, first);
        args.topk_sim = in.topk_sim + first * in.topk;
        args.topk_index = in.topk_index + first * in.topk;
        sweep.start(pass);
        void* arguments[] = {&args};
        launch(find_mined(in.dtype), "mined", grid, kMergeThreads, 0, request.stream, arguments);
    }
    return 0;
}

// --- sums ---

size_t sum(const Request& request, const Hidden& hidden, void* workspace) {
    const BankPassArgs& in = request.pass;
    const Sweep sweep(request, request.null_epilogue ? Work::kProducts : Work::kPass);
    MergeArgs args = {common(request), in.neg_lse, in.neg_mean, in.neg_sq_lse, in.neg_count};
    PassArgs& pass = args.pass;
    sweep.cut(pass, in.batch);
    Cutter cutter(workspace);
    pass.sums = cutter.take<RowSums>(int64_t(pass.splits) * pass.batch);
    pass.means = cutter.take<float>(int64_t(pass.splits) * pass.batch * pass.dim);
    pass.hidden = hidden;
    if (workspace == nullptr) return cutter.bytes();
    sweep.start(pass);
    void* arguments[] = {&args};
    launch(find_merge(in.dtype), "merge", small_grid(request, pass.batch), kMergeThreads, 0,
           request.stream, arguments);
    return 0;
}

}  // namespace

void bank_pass(const Request& request, const Allocate& allocate) {
    const BankPassArgs& in = request.pass;
    if (in.batch == 0) return;
    const DeviceGuard guard(request.device);
    const bool mines = in.topk > 0, hides_mined = request.sums && in.exclude_mined && mines;
    const Hidden nothing = {};
    Hidden hidden = {};
    hidden.ids = in.exclude.ids, hidden.bank_ids = in.exclude.bank_ids;
    hidden.listed = int(in.exclude.listed + (hides_mined ? in.topk : 0));
    const bool given = hides(request), any = given || hides_mined;

    // Mining is done before the sums begin: they have the same memory.
    const size_t marks = any ? lay_out(hidden, request, nullptr) : 0;
    const size_t mining = mines ? mine(request, nothing, nothing, nullptr) : 0;
    const size_t summing = request.sums ? sum(request, nothing, nullptr) : 0;
    char* workspace = static_cast<char*>(allocate(marks + std::max(mining, summing)));
    if (any) {
        lay_out(hidden, request, workspace);
        mark(request, hidden);
    }
    workspace += marks;
    if (mines)
        mine(request, given ? hidden : nothing, hides_mined ? hidden : nothing, workspace);
    if (request.sums) sum(request, any ? hidden : nothing, workspace);
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
