// Driver of the CPU backend: picks the instruction set, splits the work, starts the threads, merges
// partial results in a fixed order. Compiled for the baseline processor.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"

namespace psm::cpu {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- instruction sets ----

std::vector<const Kernels*> available() {  // best first
    std::vector<const Kernels*> found;
#if PSM_X86
    for (const Kernels* kernels : {avx512_bf16_kernels(), avx512_kernels(), avx2_kernels()})
        if (kernels) found.push_back(kernels);
#endif
    found.push_back(portable_kernels());
    return found;
}

}  // namespace

const Kernels& choose(const std::string& isa, Dtype dtype) {
    for (const Kernels* kernels : available())
        if (kernels->name == isa) {
#if PSM_X86
            // Only bf16 banks gain from the bf16 product; one compiled copy serves the rest.
            if (kernels->pairs && dtype != Dtype::kBFloat16) return *avx512_kernels();
#endif
            return *kernels;
        }
    throw std::invalid_argument("isa: got '" + isa + "', which this machine lacks");
}

namespace {

// ---- split ----

constexpr int64_t kMaxChunks = 24;            // 2, 3, 4, 6, 8, 12 and 24 threads divide it
constexpr int64_t kPartialBytes = 32 << 20;   // of all chunks together
constexpr int64_t kGroupBytes = 384 << 10;    // queries and means of a group stay in a 1 MB L2
constexpr int64_t kMinGroupBlocks = 16;       // rows that share the packing of a tile

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks depend on the problem alone, because sums are merged by chunk; groups of rows may depend
// on the number of threads, because rows never meet.
void split(Task& t, int threads) {
    t.padded = ceil_div(t.dim, kPad) * kPad;
    t.lead = ((t.col_offset % 16) + 16) % 16;
    // A tile, packed twice, and the queries share a 1 MB L2; more slots use the registers better.
    t.tile = t.padded <= 192 ? kTile : t.padded <= 1024 ? kTile / 2 : kTile / 4;
    t.tiles = t.count > 0 ? ceil_div(t.count + t.lead, t.tile) : 0;
    t.blocks = ceil_div(t.rows, kBlock);
    const int64_t row_bytes = t.sums ? t.padded * 4 : t.topk * 8;
    const int64_t affordable = kPartialBytes / std::max<int64_t>(t.rows * row_bytes, 1);
    t.chunks = std::clamp<int64_t>(std::min(t.tiles * t.tile / 256, affordable), 1, kMaxChunks);
    const int64_t block_bytes = kBlock * t.padded * (t.sums ? 8 : 1);
    t.group_blocks = std::max(kGroupBytes / block_bytes, kMinGroupBlocks);
    // A row that one thread mines alone has one heap, and half the insertions that two would have:
    // 1.7 to 1.3 s for 10,000 queries, 50,000 rows, D = 512, k = 200.
    if (!t.sums && ceil_div(t.blocks, t.group_blocks) >= 3 * threads) t.chunks = 1;
    while (ceil_div(t.blocks, t.group_blocks) * t.chunks < 3 * threads && t.group_blocks > 8)
        t.group_blocks = ceil_div(t.group_blocks, 2);
    t.groups = std::max<int64_t>(ceil_div(t.blocks, t.group_blocks), 1);
    t.group_blocks = ceil_div(t.blocks, t.groups);
    t.heap_sets = t.chunks > 1 ? threads : 1;  // with one chunk, a row has one thread
}

// ---- workspace ----

// Carves aligned arrays out of one allocation; given null it only measures.
class Arena {
  public:
    explicit Arena(void* base)
        : base_(ceil_div(int64_t(uintptr_t(base)) + 1, kAlign) * kAlign) {}

    template <class T>
    void take(T*& array, int64_t count) {
        array = reinterpret_cast<T*>(base_ + used_);
        used_ += ceil_div(count * int64_t(sizeof(T)), kAlign) * kAlign;
    }
    size_t bytes() const { return size_t(used_ + kAlign); }

  private:
    static constexpr int64_t kAlign = 64;
    int64_t base_, used_ = 0;
};

void lay_out(Task& t, const Kernels& kernels, Arena& arena) {
    const bool pairs = kernels.pairs && t.dtype == Dtype::kBFloat16;
    const int64_t panel_rows = t.blocks * kBlock;
    if (t.sums) {
        if (pairs)
            arena.take(t.query_pairs, panel_rows * t.padded / 2);
        else
            arena.take(t.query_panel, panel_rows * t.dim);
        for (float** part : {&t.part_shift, &t.part_sq_shift, &t.part_sum, &t.part_sq,
                             &t.part_count})
            arena.take(*part, t.chunks * t.rows);
        arena.take(t.part_mean, t.mean ? t.chunks * t.rows * t.padded : 0);
        arena.take(t.hidden, t.rows * t.most_hidden);
    } else {
        arena.take(t.query_rows, t.rows * t.padded);
        if (kernels.quads)
            arena.take(t.query_quads, panel_rows * t.padded / 4);
        else
            arena.take(t.query_panel, panel_rows * t.dim);
        for (float** row : {&t.inverse, &t.norm, &t.residual}) arena.take(*row, t.rows);
        arena.take(t.heaps, t.heap_sets * t.rows * t.topk);
        arena.take(t.bars, t.heap_sets * t.rows);
    }
}

void lay_out(Worker& w, const Task& t, const Kernels& kernels, Arena& arena) {
    const int64_t group_rows = t.group_blocks * kBlock;
    arena.take(w.rows, (t.query_quads ? 1 : t.tile) * t.padded);
    if (t.query_pairs) {
        arena.take(w.pairs, t.tile * t.padded / 2);
        arena.take(w.row_pairs, t.tile / 2 * t.padded);
        arena.take(w.weight_pairs, kBlock * kTile / 2);
    } else if (t.query_panel) {
        arena.take(w.panel, t.tile * t.dim);
    } else {
        arena.take(w.quads, t.tile * t.padded / 4);
        arena.take(w.bytes, t.tile * t.padded);
        arena.take(w.slot_step, kTile);
        arena.take(w.slot_bias, kTile);
    }
    arena.take(w.scores, kGang * kBlock * kTile);
    arena.take(w.ids, kTile);
    if (t.sums) {
        arena.take(w.scratch, 2 * kTile);
        arena.take(w.words, kTile);
        arena.take(w.kept, kGang * kBlock * kTile / kSub);
        arena.take(w.rho, kTile);
        arena.take(w.hidden, kTile / kSub);
        arena.take(w.next, group_rows);
        arena.take(w.columns, 4 * kBatches);
        arena.take(w.state, group_rows * 3 * kLanes);
        arena.take(w.shift, group_rows);
        arena.take(w.sq_shift, group_rows);
    }
}

struct Layout {
    Task task;
    std::vector<Worker> workers;
    size_t bytes;
};

Layout lay_out(Task task, const Kernels& kernels, int threads, void* workspace) {
    // A thread takes some 30 us to start: give each at least as much to do.
    constexpr double kThreadProducts = 4e6;
    const double products = double(task.rows) * double(task.count) * double(task.dim);
    threads = int(std::clamp<double>(products / kThreadProducts, 1, threads));
    split(task, threads);
    Arena arena(workspace);
    lay_out(task, kernels, arena);
    std::vector<Worker> workers(size_t(std::min<int64_t>(threads, task.groups * task.chunks)));
    for (size_t i = 0; i < workers.size(); ++i) {
        lay_out(workers[i], task, kernels, arena);
        const int64_t set_row = (task.heap_sets > 1 ? int64_t(i) : 0) * task.rows;
        workers[i].heaps = task.heaps + set_row * task.topk;
        workers[i].bars = task.bars + set_row;
    }
    return {task, std::move(workers), arena.bytes()};
}

// ---- merge ----

struct Outputs {
    float *neg_lse, *neg_mean, *neg_sq_lse, *neg_count, *topk_sim;
    int64_t* topk_index;
};

float log_of(double sum, float shift) {
    return sum == 0.0 ? -kInfinity : float((std::log2(sum) + double(shift)) * kLn2);
}

void merge_sums(const Task& t, int64_t i, const Outputs& out, float* mean) {
    float shift = -kInfinity, sq_shift = -kInfinity;
    for (int64_t c = 0; c < t.chunks; ++c) {
        shift = std::max(shift, t.part_shift[c * t.rows + i]);
        sq_shift = std::max(sq_shift, t.part_sq_shift[c * t.rows + i]);
    }
    double sum = 0.0, squares = 0.0, count = 0.0;
    const int64_t dim = t.mean ? t.dim : 0;  // read once, or the loops below are not vectorized
    std::fill(mean, mean + dim, 0.0f);
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t at = c * t.rows + i;
        count += t.part_count[at];
        // An empty part has shift -inf; a part spoiled by NaN must still be added.
        if (t.part_shift[at] == -kInfinity && t.part_sum[at] == 0.0f) continue;
        const float factor = std::exp2(t.part_shift[at] - shift);
        sum += double(factor) * t.part_sum[at];
        squares += double(std::exp2(t.part_sq_shift[at] - sq_shift)) * t.part_sq[at];
        const float* part = t.part_mean + at * t.padded;
        for (int64_t d = 0; d < dim; ++d) mean[d] += factor * part[d];
    }
    out.neg_lse[i] = log_of(sum, shift);
    out.neg_sq_lse[i] = log_of(squares, sq_shift);
    out.neg_count[i] = float(count);
    const float inverse = sum == 0.0 ? 0.0f : float(1.0 / sum);
    for (int64_t d = 0; d < dim; ++d) out.neg_mean[i * dim + d] = mean[d] * inverse;
}

void merge_heaps(const Task& t, int64_t i, const Outputs& out, std::vector<uint64_t>& entries) {
    entries.clear();
    for (int64_t s = 0; s < t.heap_sets; ++s) {
        const uint64_t* heap = t.heaps + (s * t.rows + i) * t.topk;
        entries.insert(entries.end(), heap, heap + t.topk);
    }
    std::partial_sort(entries.begin(), entries.begin() + t.topk, entries.end(),
                      std::greater<uint64_t>());
    for (int64_t n = 0; n < t.topk; ++n) {
        float sim = -kInfinity;
        int64_t index = -1;
        if (const uint64_t entry = entries[size_t(n)]) {
            const uint32_t ordered = uint32_t(entry >> 32);
            const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
            std::memcpy(&sim, &bits, sizeof sim);
            index = int64_t(0xFFFFFFFFu - uint32_t(entry));
        }
        out.topk_sim[i * t.topk + n] = sim;
        out.topk_index[i * t.topk + n] = index;
    }
}

// The slots that the sums of each row leave out, those that were mined among them.
void list_hidden(const Task& t) {
    const int64_t mined = t.most_hidden - 1 - t.exclude.listed;
    for (int64_t i = 0; i < t.rows; ++i) {
        int64_t *list = t.hidden + i * t.most_hidden, *end = list;
        const auto add = [&](const int64_t* slots, int64_t count) {
            end = std::copy_if(slots, slots + count, end,
                               [&](int64_t slot) { return slot >= 0 && slot < t.count; });
        };
        add(t.exclude.slots + i * t.exclude.listed, t.exclude.listed);
        add(t.mined + i * mined, mined);
        std::sort(list, end);
        *end = kNoSlot;
    }
}

void run_task(Task problem, const Kernels& kernels, int threads, void* workspace,
              const Outputs& out) {
    Layout layout = lay_out(problem, kernels, threads, workspace);
    const Task& t = layout.task;
    if (t.rows == 0) return;
    if (t.sums) list_hidden(t);
    if (t.topk) std::memset(t.heaps, 0, size_t(t.heap_sets * t.rows * t.topk) * sizeof(uint64_t));
    kernels.prepare(t);

    const int64_t items = t.groups * t.chunks;
    std::atomic<int64_t> next_item{0}, next_rows{0};
    run_threads(layout.workers.size(), [&](size_t i) {
        for (int64_t item; (item = next_item.fetch_add(1)) < items;)
            kernels.process(t, layout.workers[i], item);
    });
    constexpr int64_t kRows = 16;
    run_threads(layout.workers.size(), [&](size_t) {
        std::vector<float> mean(size_t(t.sums ? t.dim : 0));
        std::vector<uint64_t> entries;
        for (int64_t first; (first = next_rows.fetch_add(kRows)) < t.rows;)
            for (int64_t i = first; i < std::min(first + kRows, t.rows); ++i) {
                if (t.sums) merge_sums(t, i, out, mean.data());
                if (t.topk) merge_heaps(t, i, out, entries);
            }
    });
}

int64_t valid_slots(const Bank& bank) {
    return std::clamp<int64_t>(bank.slots ? *bank.count : 0, 0, bank.slots);
}

Task common_task(const PassArgs& args) {
    Task t{};
    t.bank = args.bank.rows, t.dtype = args.bank.dtype, t.dim = args.bank.dim;
    t.count = valid_slots(args.bank), t.rows = args.batch, t.exclude = args.exclude;
    return t;
}

Task mining_task(const PassArgs& args) {
    Task t = common_task(args);
    t.query = args.key, t.topk = args.options.topk;
    return t;
}

Task summing_task(const PassArgs& args) {
    Task t = common_task(args);
    const PassOptions& o = args.options;
    t.query = args.query, t.s_pos = args.s_pos;
    t.selection = o.selection, t.sums = true, t.mean = args.neg_mean != nullptr;
    t.scale = float(kLog2e / o.temperature), t.slope = float(-o.a * kLog2e), t.b = o.b;
    if (args.rng_state)
        t.seed = uint64_t(args.rng_state[0]), t.offset = uint64_t(args.rng_state[1]);
    t.row_offset = o.row_offset, t.col_offset = o.col_offset;
    t.affine = args.affine, t.rho = args.rho, t.mined = args.topk_index;
    t.most_hidden = args.exclude.listed + (o.exclude_mined ? o.topk : 0) + 1;
    return t;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.push_back(kernels->name);
    return names;
}

size_t workspace_bytes(const PassArgs& args, const std::string& isa, int threads) {
    const Kernels& kernels = choose(isa, args.bank.dtype);
    size_t bytes = 0;
    if (args.options.topk) bytes = lay_out(mining_task(args), kernels, threads, nullptr).bytes;
    if (args.query)
        bytes = std::max(bytes, lay_out(summing_task(args), kernels, threads, nullptr).bytes);
    return bytes;
}

void bank_pass(const PassArgs& args, const std::string& isa, int threads) {
    const Kernels& kernels = choose(isa, args.bank.dtype);
    const std::unique_ptr<char[]> workspace(new char[workspace_bytes(args, isa, threads)]);
    const Outputs out{args.neg_lse,   args.neg_mean, args.neg_sq_lse,
                      args.neg_count, args.topk_sim, args.topk_index};
    if (args.options.topk) run_task(mining_task(args), kernels, threads, workspace.get(), out);
    if (args.query) run_task(summing_task(args), kernels, threads, workspace.get(), out);
}

}  // namespace psm::cpu
