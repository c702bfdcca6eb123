#include "pass.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace psm::cpu {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kRows = 16;  // of one item where rows are merged

std::vector<const Kernels*> available() {  // best first
    std::vector<const Kernels*> found;
#if PSM_X86
    for (const Kernels* kernels : {avx512_bf16_kernels(), avx512_kernels(), avx2_kernels()})
        if (kernels) found.push_back(kernels);
#endif
    found.push_back(portable_kernels());
    return found;
}

Task common_task(const PassArgs& args) {
    Task t{};
    t.bank = args.bank.rows, t.dtype = args.bank.dtype, t.dim = args.bank.dim;
    t.count = std::clamp<int64_t>(*args.bank.count, 0, args.bank.slots);
    t.rows = args.batch, t.exclude = args.exclude;
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
    if (o.selection == Selection::kBernoulli)
        t.seed = uint64_t(args.rng_state[0]), t.offset = uint64_t(args.rng_state[1]);
    t.row_offset = o.row_offset, t.col_offset = o.col_offset;
    t.affine = args.affine, t.rho = args.rho;
    t.most_hidden = args.exclude.listed + (o.exclude_mined ? o.topk : 0) + 1;
    return t;
}

// A thread takes some 30 us to start: give each at least as much to do.
size_t worthwhile(const PassArgs& args, int64_t count, int threads) {
    constexpr double kThreadProducts = 4e6;
    const double products = double(args.batch) * double(count) * double(args.bank.dim);
    return size_t(std::clamp<double>(products / kThreadProducts, 1, threads));
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

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.push_back(kernels->name);
    return names;
}

Pass::Pass(const PassArgs& args, const std::string& isa, int most_threads)
    : kernels(choose(isa, args.bank.dtype)), topk_sim_(args.topk_sim), topk_index_(args.topk_index) {
    threads = worthwhile(args, common_task(args).count, most_threads);
    if (args.options.topk) {
        mining = mining_task(args);
        split(mining, threads);
        miners_.resize(threads);
    }
    if (args.query) {
        sums = summing_task(args);
        split(sums, threads);
        summers_.resize(threads);
    }
}

void Pass::lay_out(Arena& arena) {
    cpu::lay_out(mining, kernels, arena);
    for (size_t i = 0; i < miners_.size(); ++i) cpu::lay_out(miners_[i], mining, i, arena);
    cpu::lay_out(sums, kernels, arena);
    for (size_t i = 0; i < summers_.size(); ++i) cpu::lay_out(summers_[i], sums, i, arena);
}

void Pass::run(const std::function<void(int64_t)>& before,
               const std::function<void(size_t, float*, int64_t)>& after) {
    const int64_t rows = std::max(mining.rows, sums.rows), batches = ceil_div(rows, kRows);
    const auto each_row = [&](int64_t batch, auto visit) {
        for (int64_t i = batch * kRows; i < std::min(rows, (batch + 1) * kRows); ++i) visit(i);
    };
    run_phases(threads, {
        {ceil_div(rows, kBlock), [&](size_t, int64_t block) {
            before(block);
            if (mining.rows) kernels.prepare(mining, block);
            if (sums.rows) kernels.prepare(sums, block);
        }},
        {mining.rows ? mining.groups * mining.chunks : 0, [&](size_t worker, int64_t item) {
            kernels.process(mining, miners_[worker], item);
        }},
        {batches, [&](size_t, int64_t batch) {
            each_row(batch, [&](int64_t row) {
                if (mining.rows) merge_heaps(row);
                if (sums.rows) list_hidden(row);
            });
        }},
        {sums.rows ? sums.groups * sums.chunks : 0, [&](size_t worker, int64_t item) {
            kernels.process(sums, summers_[worker], item);
        }},
        {sums.rows ? batches : 0, [&](size_t worker, int64_t batch) {
            each_row(batch, [&](int64_t row) { after(worker, summers_[worker].mean, row); });
        }},
    });
}

size_t workspace_bytes(const PassArgs& args, const std::string& isa, int threads) {
    Pass pass(args, isa, threads);
    Arena measured;
    pass.lay_out(measured);
    return measured.bytes();
}

void bank_pass(const PassArgs& args, const std::string& isa, int threads) {
    Pass pass(args, isa, threads);
    if (args.batch == 0) return;
    const Memory memory = with_memory([&](Arena& arena) { pass.lay_out(arena); });
    const int64_t dim = args.bank.dim;
    pass.run([](int64_t) {}, [&](size_t, float* mean, int64_t row) {
        const Sums sums = merge_sums(pass.kernels, pass.sums, row, mean);
        args.neg_lse[row] = float(sums.lse);
        args.neg_sq_lse[row] = float(sums.sq_lse);
        args.neg_count[row] = float(sums.count);
        if (args.neg_mean) std::copy_n(mean, dim, args.neg_mean + row * dim);
    });
}

}  // namespace psm::cpu
