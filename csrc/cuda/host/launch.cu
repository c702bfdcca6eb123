// A pass over the bank: what is hidden is marked, slots are mined and, where wanted, marked too,
// and then the rest is summed.
#include "launch.h"

#include <cmath>

#include "../common/mined.cuh"
#include "plan.h"

namespace psm::cuda {

namespace {

__global__ void __launch_bounds__(kMarkThreads)
    mark_kernel(const __grid_constant__ KernelArgs args) {
    __shared__ MarkShared shared;
    mark_lists(args);
    if (args.exclude.ids != nullptr) mark_ids(args, shared);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    mined_kernel(const __grid_constant__ MinedArgs args) {
    __shared__ MinedShared shared;
    mine_rows<T>(args, shared);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    merge_kernel(const __grid_constant__ KernelArgs args) {
    __shared__ MergeShared shared;
    merge_rows<T>(args, shared);
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

// p = 2^-(sharpness (s - s_pos - b))^2 needs one FFMA for the difference when s_pos + b is scaled
// beforehand. Its rounding matters only to a very sharp p, whose scale is made a power of two, so
// that s = s_pos + b gives exactly 0. Never 0: 0 * -inf of a missing slot would be NaN.
float sharpness_of(double a) {
    const double exact = std::sqrt(a * 1.4426950408889634);
    const double rounded = exact > 1048576.0 ? std::exp2(std::round(std::log2(exact))) : exact;
    return float(std::fmax(rounded, 1e-30));
}

bool hides(const Exclude& exclude) { return exclude.listed > 0 || exclude.ids != nullptr; }

bool wants_sums(const PassArgs& args) { return args.query != nullptr; }
bool hides_mined(const PassArgs& args) {
    return wants_sums(args) && args.options.topk > 0 && args.options.exclude_mined;
}

// Marks what the caller hides.
void mark(KernelArgs& args, Call& call) {
    const int64_t work = std::max(args.bank.slots, args.batch * args.hidden.listed);
    call.launch(reinterpret_cast<const void*>(mark_kernel), "mark",
                call.small_grid(work / kMarkThreads + 1), kMarkThreads, 0, args);
}

// The same for rows from `row` on.
Hidden from_row(Hidden hidden, int64_t row) {
    if (hidden.flags == nullptr) return hidden;
    hidden.flags += row / kFlagRows * hidden.words;
    hidden.list += row * hidden.listed;
    return hidden;
}
void skip_rows(KernelArgs& args, int64_t row) {
    const int64_t element = args.bank.dtype == Dtype::kFloat32 ? 4 : 2;
    args.query = static_cast<const char*>(args.query) + row * args.bank.dim * element;
    args.hidden = from_row(args.hidden, row);
    if (args.exclude.ids != nullptr) args.exclude.ids += row;
    args.topk_sim += row * args.options.topk, args.topk_index += row * args.options.topk;
}

// The top-k of `args.query`, which becomes hidden in `next`, if that has flags.
void mine(const KernelArgs& args, const Hidden& next, Call& call) {
    const Plan plan(args, Work::kMine, call);
    const PassKernel& kernel = plan.kernel;
    const int64_t slots = args.bank.slots + lead_slots(args.options.col_offset);
    const int64_t topk = args.options.topk, start = call.used();
    KernelArgs common = args;
    common.cell_group = kernel.cell_group;
    common.cell_log2 = std::max(call.place.cell_log2, choose_cell_log2(topk, args.bank.dim, slots,
                                                                       kernel.cell_group));
    common.cells = room_for_cells(slots, kernel.tile_slots, common);
    const int chosen = chosen_cells(topk, common.cells, common);
    const int64_t most = kMineBytes / (int64_t(common.cells) * 4) / kernel.rows * kernel.rows;
    const int64_t step = std::max<int64_t>(most, kernel.rows);
    for (int64_t first = 0; first < args.batch; first += step) {
        MinedArgs mined = {common, from_row(next, first)};
        KernelArgs& pass = mined.pass;
        skip_rows(pass, first);
        pass.batch = std::min(step, args.batch - first);
        plan.cut(pass);
        const bool few = few_mined(pass);
        const int64_t grid = call.small_grid(pass.batch, few ? 16 : 4);
        call.release_to(start);
        pass.cell_max = call.take<float>((pass.batch + 1) * pass.cells);
        if (!few) {
            mined.cell_keys = call.take<uint64_t>(grid * power_of_two(chosen));
            mined.slot_keys = call.take<uint64_t>(grid * power_of_two(int(topk)));
            mined.scores = call.take<float>(grid * chosen << pass.cell_log2);
        }
        plan.start(pass, call);
        call.launch(find_mined(args.bank.dtype), "mined", grid, kRowThreads, 0, mined);
    }
}

// Partial sums of the splits.
void sum(KernelArgs& args, Call& call) {
    const bool in_turns = call.place.ping_pong && args.options.selection == Selection::kBernoulli;
    const Work work = call.place.null_epilogue ? Work::kProducts
                      : in_turns               ? Work::kInTurns
                                               : Work::kPass;
    const Plan plan(args, work, call);
    plan.cut(args);
    args.sums = call.take<RowSums>(args.splits * args.batch);
    args.means = call.take<float>(args.splits * args.batch * args.bank.dim);
    plan.start(args, call);
}

void bank_pass(const PassArgs& given, Call& call) {
    if (given.batch == 0) return;
    const Hidden hidden = room_for_hidden(given, call);
    if (hidden.flags != nullptr)
        call.clear(hidden.flags, flag_words(hidden, given.batch) * sizeof(uint32_t));
    KernelArgs args = run_pass(given, hidden, call);
    if (wants_sums(given))
        call.launch(find_merge(args.bank.dtype), "merge", row_grid(args.batch), kRowThreads, 0,
                    args);
}

}  // namespace

Hidden room_for_hidden(const PassArgs& args, Call& call) {
    Hidden hidden = {};
    if (!hides(args.exclude) && !hides_mined(args)) return hidden;
    const int64_t slots = args.bank.slots + lead_slots(args.options.col_offset);
    hidden.listed = int(args.exclude.listed + hides_mined(args) * args.options.topk);
    hidden.words = int((slots + 32 * kFlagSlots - 1) / (32 * kFlagSlots));
    hidden.flags = call.take<uint32_t>(flag_words(hidden, args.batch));
    hidden.list = call.take<int>(args.batch * hidden.listed);
    return hidden;
}

KernelArgs run_pass(const PassArgs& given, Hidden hidden, Call& call) {
    KernelArgs args = {given};
    args.aligned = rows_aligned(given);
    args.scale = float(1.4426950408889634 / given.options.temperature);
    args.sharpness = sharpness_of(given.options.a);
    args.trapped = call.measures ? nullptr : trapped();

    args.hidden = hidden;
    if (hides(given.exclude)) mark(args, call);
    const size_t start = call.used();
    if (given.options.topk > 0) {
        KernelArgs keys = args;
        keys.query = args.key;
        if (!hides(given.exclude)) keys.hidden = {};
        mine(keys, hides_mined(given) ? hidden : Hidden{}, call);
    }
    call.release_to(start);  // mining is done before the sums begin: they have the same memory
    if (wants_sums(given)) sum(args, call);
    return args;
}

size_t workspace_bytes(const PassArgs& args, const Place& place) {
    Call call(place, true);
    bank_pass(args, call);
    return call.bytes();
}

void bank_pass(const PassArgs& args, const Place& place) {
    Call call(place);
    bank_pass(args, call);
}

void load_passes(int device) {
    constexpr Selection kSelections[] = {Selection::kBernoulli, Selection::kExpected,
                                         Selection::kAll, Selection::kAffine};
    load(reinterpret_cast<const void*>(mark_kernel), "mark");
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
        load(find_mined(dtype), "mined");
        load(find_merge(dtype), "merge");
        for (Find find : {portable_kernels(dtype), hopper_kernels(dtype, device)}) {
            if (find == nullptr) continue;
            for (int dim : {64, 128, 256, 512, kMaxTopkDim}) {
                resident_blocks(find(Selection::kAll, Work::kMine, dim), device);
                if (dim > kMaxDim) continue;
                resident_blocks(find(Selection::kAll, Work::kProducts, dim), device);
                resident_blocks(find(Selection::kBernoulli, Work::kInTurns, dim), device);
                for (Selection selection : kSelections)
                    resident_blocks(find(selection, Work::kPass, dim), device);
            }
        }
    }
}

std::string unavailable(int device) {
    try {
        const DeviceGuard guard(device);
        load_passes(device);
        load_steps();
        load_enqueues();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

}  // namespace psm::cuda
