#include "pass.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace psm::cpu {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kRows = 16;  // of one item where rows are merged

std::vector<const Kernels*> available() {  // the newest first
    std::vector<const Kernels*> found;
#if PSM_X86
    for (const Kernels* kernels : {avx512_bf16_kernels(), avx512_vnni_kernels(), avx512_kernels(),
                                   avx2_kernels()})
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
    t.slot_bias = args.slot_bias, t.temperature = o.temperature;
    t.most_hidden = args.exclude.listed + (o.exclude_mined ? o.topk : 0) + 1;
    return t;
}

// A thread takes some 30 us to start: give each at least as much to do.
Threads worthwhile(const PassArgs& args, int64_t count, int most) {
    constexpr double kThreadProducts = 4e6;
    const double products = double(args.batch) * double(count) * double(args.bank.dim);
    return {size_t(std::clamp<double>(products / kThreadProducts, 1, most)), size_t(most)};
}

}  // namespace

const Kernels& choose(const std::string& isa, Dtype dtype) {
    for (const Kernels* kernels : available())
        if (kernels->name == isa) {
#if PSM_X86
            // Only bf16 banks gain from the bf16 product; one compiled copy serves the rest.
            if (kernels->pairs && dtype != Dtype::kBFloat16) return *avx512_vnni_kernels();
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

std::string products(const std::string& isa) {
    const bool pairs = choose(isa, Dtype::kBFloat16).pairs;
    return std::string("bf16 banks by ") + (pairs ? "the bf16 dot product" : "fp32 after conversion") +
           ", mining by " + (choose(isa, Dtype::kFloat32).quads ? "bytes" : "fp32");
}

Pass::Pass(const PassArgs& args, const std::string& isa, int most_threads)
    : kernels(choose(isa, args.bank.dtype)), topk_sim_(args.topk_sim), topk_index_(args.topk_index) {
    threads = worthwhile(args, common_task(args).count, most_threads);
    if (args.options.topk) mining = Stage(mining_task(args), threads.used);
    if (args.query) sums = Stage(summing_task(args), threads.used);
}

void Pass::run(const std::function<void(int64_t)>& before,
               const std::function<void(size_t, float*, int64_t)>& after) {
    const int64_t rows = std::max(mining.task.rows, sums.task.rows);
    const auto each_row = [&](auto visit) {
        run_items(threads, ceil_div(rows, kRows), [&](size_t worker, int64_t item) {
            const int64_t last = std::min(rows, (item + 1) * kRows);
            for (int64_t i = item * kRows; i < last; ++i) visit(worker, i);
        });
    };
    const auto process = [&](Stage& stage) {
        run_items(threads, stage.items(), [&](size_t worker, int64_t item) {
            kernels.process(stage.task, stage.workers[worker], item);
        });
    };
    run_items(threads, ceil_div(rows, kBlock), [&](size_t, int64_t block) {
        before(block);
        for (const Stage* stage : {&mining, &sums})
            if (stage->task.rows) kernels.prepare(stage->task, block);
    });
    process(mining);
    each_row([&](size_t, int64_t row) {
        if (mining.task.rows) merge_heaps(row);
        if (sums.task.rows) list_hidden(row);
    });
    process(sums);
    if (sums.task.rows)
        each_row([&](size_t i, int64_t row) { after(i, sums.workers[i].mean, row); });
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
        const Sums sums = merge_sums(pass.kernels, pass.sums.task, row, mean);
        args.neg_lse[row] = float(sums.lse);
        args.neg_sq_lse[row] = float(sums.sq_lse);
        args.neg_count[row] = float(sums.count);
        if (args.neg_mean) std::copy_n(mean, dim, args.neg_mean + row * dim);
    });
}

}  // namespace psm::cpu
