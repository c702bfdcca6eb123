// Plans a pass over the bank, gets workspace, starts the kernels: what is hidden is marked, slots
// are mined and, where wanted, marked too, and then the rest is summed.
#include "launch.h"

#include "sweep.h"

namespace psm::cuda {

namespace {

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

const void* find_mined(Dtype dtype) {
    return visit_dtype(dtype, [](auto type) {
        return reinterpret_cast<const void*>(mined_kernel<typename decltype(type)::type>);
    });
}
const void* find_merge(Dtype dtype) {
    return visit_dtype(dtype, [](auto type) {
        return reinterpret_cast<const void*>(merge_kernel<typename decltype(type)::type>);
    });
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

int64_t flag_words(const Request& request, const Hidden& hidden) {
    return (request.pass.batch + 127) / 128 * (128 / kFlagRows) * hidden.words;  // whole blocks
}

size_t lay_out(Hidden& hidden, const Request& request, void* workspace) {
    Cutter cutter(workspace);
    const int64_t slots = request.slots + lead_slots(request.pass.col_offset);
    hidden.words = int((slots + 32 * kFlagSlots - 1) / (32 * kFlagSlots));
    hidden.flags = cutter.take<uint32_t>(flag_words(request, hidden));
    hidden.list = cutter.take<int>(request.pass.batch * hidden.listed);
    return cutter.bytes();
}

// Clears the flags and marks what the caller hides.
void mark(const Request& request, const Hidden& hidden) {
    const size_t bytes = flag_words(request, hidden) * sizeof(uint32_t);
    check(cudaMemsetAsync(hidden.flags, 0, bytes, static_cast<cudaStream_t>(request.stream)),
          "cudaMemsetAsync");
    if (!hides(request)) return;
    MarkArgs args = {common(request), request.pass.exclude};
    args.pass.hidden = hidden;
    const int64_t work = std::max(request.slots, request.pass.batch * hidden.listed);
    void* arguments[] = {&args};
    launch(reinterpret_cast<const void*>(mark_kernel), "mark",
           small_grid(request, work / kMarkThreads + 1), kMarkThreads, 0, request.stream,
           arguments);
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
