#include "check.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace psm {

void refuse(const std::string& name, const std::string& got, const std::string& want) {
    throw std::invalid_argument(name + ": got " + got + ", wanted " + want);
}

void check_size(const char* name, int64_t size, int64_t least, int64_t most) {
    if (size < least || size > most)
        refuse(name, std::to_string(size),
               "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
}

namespace {

constexpr int64_t kMaxSize = int64_t(1) << 40;  // of any product of two sizes: nothing overflows

int64_t element(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

void check_temperature(const char* name, float value) {
    if (!(value > 0.0f) || std::isinf(value))
        refuse(name, std::to_string(value), "a number above 0");
}

void check_alignment(const char* name, const void* pointer, int64_t bytes) {
    const auto address = uintptr_t(pointer);
    if (address % uintptr_t(bytes) != 0)
        refuse(name, "address " + std::to_string(address), "a multiple of " + std::to_string(bytes));
}

// `wanted`: elements behind the pointer.
void check_pointer(const char* name, const void* pointer, int64_t wanted, int64_t bytes) {
    if (wanted > 0 && pointer == nullptr) refuse(name, "a null pointer", "an address");
    check_alignment(name, pointer, bytes);
}

template <class T>
void check_pointer(const char* name, const T* pointer, int64_t wanted) {
    check_pointer(name, pointer, wanted, sizeof(T));
}

void check_bank(const Bank& bank, const Limits& most) {
    check_size("dtype", int64_t(bank.dtype), 0, 2);
    check_size("dim", bank.dim, 1, most.dim);
    check_size("slots", bank.slots, 0, most.slots);
    check_pointer("bank", bank.rows, bank.slots, element(bank.dtype));
    check_pointer("count", bank.count, 1);
}

// What a pass and a step have in common.
void check_problem(const PassArgs& args, bool sums, const Limits& most) {
    const PassOptions& options = args.options;
    check_bank(args.bank, most);
    check_size("batch", args.batch, 0, std::min(most.batch, kMaxSize / args.bank.dim));
    const int64_t most_per_row = kMaxSize / std::max<int64_t>(args.batch, 1);
    check_size("topk", options.topk, 0, std::min(most.topk, most_per_row));
    check_size("selection", int64_t(options.selection), 0, 3);
    check_temperature("temperature", options.temperature);
    const Exclude& exclude = args.exclude;
    check_size("listed", exclude.listed, 0, most_per_row);
    check_pointer("exclude", exclude.slots, args.batch * exclude.listed);
    check_pointer("ids", exclude.ids, exclude.bank_ids ? args.batch : 0);
    check_pointer("bank_ids", exclude.bank_ids, exclude.ids ? args.bank.slots : 0);
    const bool draws = sums && options.selection == Selection::kBernoulli;
    check_pointer("rng_state", args.rng_state, draws ? args.batch : 0);
}

}  // namespace

void check(const PassArgs& args, const Limits& most) {
    const int64_t batch = args.batch, topk = args.options.topk;
    const bool sums = args.query != nullptr;
    check_problem(args, sums, most);
    const int64_t bytes = element(args.bank.dtype), summed = sums ? batch : 0;
    check_alignment("query", args.query, bytes);
    check_pointer("key", args.key, topk ? batch : 0, bytes);
    check_pointer("s_pos", args.s_pos, summed);
    const bool weighs = args.options.selection == Selection::kAffine;
    check_pointer("affine", args.affine, weighs ? batch : 0);
    check_pointer("rho", args.rho, weighs ? args.bank.slots : 0);
    check_pointer("neg_lse", args.neg_lse, summed);
    check_alignment("neg_mean", args.neg_mean, sizeof(float));
    check_pointer("neg_sq_lse", args.neg_sq_lse, summed);
    check_pointer("neg_count", args.neg_count, summed);
    check_pointer("topk_sim", args.topk_sim, batch * topk);
    check_pointer("topk_index", args.topk_index, batch * topk);
}

void check(const StepArgs& args, const Limits& most) {
    const int64_t batch = args.pass.batch;
    check_problem(args.pass, true, most);
    check_size("selection", int64_t(args.pass.options.selection), 0, 2);
    check_pointer("query", args.query, batch);
    check_pointer("key", args.key, batch);
    check_size("soft_weights", int64_t(args.soft_weights), 0, 2);
    check_temperature("weight_temperature", args.weight_temperature);
    check_size("reduction", int64_t(args.reduction), 0, 2);
    check_pointer("loss", args.loss, batch);
    check_pointer("gradient", args.gradient, batch);
}

void check(const EnqueueArgs& args, const Limits& most) {
    check_bank(args.bank, most);
    check_size("slots", args.bank.slots, 1, most.slots);
    check_size("key_dtype", int64_t(args.key_dtype), 0, 2);
    check_size("batch", args.batch, 0, std::min(most.batch, kMaxSize / args.bank.dim));
    check_pointer("keys", args.keys, args.batch, element(args.key_dtype));
    check_alignment("labels", args.labels, sizeof(int64_t));
    check_alignment("ids", args.ids, sizeof(int64_t));
    check_pointer("bank_labels", args.bank_labels, args.bank.slots);
    check_pointer("bank_ids", args.bank_ids, args.bank.slots);
    check_pointer("ptr", args.ptr, 1);
    check_alignment("rng_state", args.rng_state, sizeof(int64_t));
}

}  // namespace psm
