#include "processor.h"

#include <unistd.h>

#if PSM_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <vector>

#include "cpu.h"

namespace psm::cpu {
namespace {

// The table. An instruction set that a processor has may be slower there than the one below it: the
// bf16 dot product of avx512_bf16 does two products per lane, but on some Intel processors it takes
// more than twice as long as an fma. A choice by name gives equal machines equal bits.
struct Known {
    const char *vendor, *name;
    int family, first_model, last_model;
    const char* best;
};
constexpr Known kKnown[] = {
    {"AuthenticAMD", "AMD Zen 4", 25, 0x10, 0xAF, "avx512_bf16"},
    {"AuthenticAMD", "AMD Zen 5", 26, 0x00, 0xFF, "avx512_bf16"},
    {"GenuineIntel", "Intel Sapphire Rapids", 6, 0x8F, 0x8F, "avx512_vnni"},
    {"GenuineIntel", "Intel Emerald Rapids", 6, 0xCF, 0xCF, "avx512_vnni"},
};

// Others are measured. What an instruction set adds must gain this much of a whole pass: bytes for
// mining gain 1.15 on Zen 4, the bf16 dot product 1.4.
constexpr double kGain = 1.05;

// A pass that mines and sums, small enough for L2 but for its first round.
class Trial {
  public:
    Trial() {
        uint32_t state = 1;
        for (uint16_t& x : bank_) {  // bf16 of either sign from 0.03 to 0.12
            state = state * 1664525u + 1013904223u;
            x = uint16_t((state >> 16 & 0x8000) | (0x3D00 + (state >> 16 & 0xFF)));
        }
        args_.options.temperature = 0.2f;
        args_.options.topk = kTopk;
        args_.bank = {bank_.data(), kSlots, kDim, Dtype::kBFloat16, &kSlots};
        args_.batch = kRows;
        args_.query = args_.key = bank_.data();
        args_.s_pos = args_.neg_lse = sums_.data();
        args_.neg_sq_lse = &sums_[kRows], args_.neg_count = &sums_[2 * kRows];
        args_.neg_mean = &sums_[3 * kRows], args_.topk_sim = &sums_[(3 + kDim) * kRows];
        args_.topk_index = slots_.data();
    }

    // Of this thread alone, whatever else the machine does.
    double milliseconds(const std::string& isa) const {
        const auto now = [] {
            timespec t;
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
            return 1e3 * double(t.tv_sec) + 1e-6 * double(t.tv_nsec);
        };
        const double start = now();
        bank_pass(args_, isa, 1);
        return now() - start;
    }

  private:
    static constexpr int64_t kRows = 48, kSlots = 512, kDim = 128, kTopk = 5;

    std::vector<uint16_t> bank_ = std::vector<uint16_t>(kSlots * kDim);
    std::vector<float> sums_ = std::vector<float>((3 + kDim + kTopk) * kRows);
    std::vector<int64_t> slots_ = std::vector<int64_t>(kTopk * kRows);
    PassArgs args_;
};

Processor measure(const std::vector<std::string>& able) {  // best first
    constexpr int kRounds = 9;
    const Trial trial;
    std::vector<double> times(able.size(), std::numeric_limits<double>::infinity());
    for (int round = 0; round < kRounds; ++round)  // all in turn: what slows one slows the others
        for (size_t i = 0; i < able.size(); ++i)
            times[i] = std::min(times[i], trial.milliseconds(able[i]));
    size_t best = able.size() - 1;
    for (size_t i = best; i-- > 0;)
        if (times[best] > kGain * times[i]) best = i;
    std::string why = "measured:";
    for (size_t i = 0; i < able.size(); ++i) {
        char text[80];
        std::snprintf(text, sizeof text, " %s %.2f ms", able[i].c_str(), times[i]);
        why += (i ? "," : "") + std::string(text);
    }
    return {able[best], why};
}

}  // namespace

Processor choose_for(const std::string& vendor, int family, int model) {
    std::vector<std::string> able = instruction_sets();
    for (const Known& known : kKnown) {
        if (vendor != known.vendor || family != known.family || model < known.first_model ||
            model > known.last_model)
            continue;
        const auto best = std::find(able.begin(), able.end(), known.best);
        if (best != able.end()) return {*best, known.name};
    }
    if (able.size() > 1) able.pop_back();  // portable is the slowest on any
    return able.size() > 1 ? measure(able) : Processor{able.front(), "the best that it runs"};
}

const Processor& processor() {
    static const Processor chosen = [] {
        char vendor[13] = "";
        unsigned a = 0, b, c, d, family = 0, model = 0;
#if PSM_X86
        if (__get_cpuid(0, &a, &b, &c, &d)) {
            std::memcpy(vendor, &b, 4), std::memcpy(vendor + 4, &d, 4), std::memcpy(vendor + 8, &c, 4);
            __get_cpuid(1, &a, &b, &c, &d);
            family = a >> 8 & 15, model = a >> 4 & 15;
            if (family == 6 || family == 15) model |= a >> 12 & 0xF0;
            if (family == 15) family += a >> 20 & 255;
        }
#endif
        return choose_for(vendor, int(family), int(model));
    }();
    return chosen;
}

int64_t l2_bytes() {
    static const int64_t bytes = [] {
        constexpr int64_t kUsual = 1 << 20, kMost = 2 << 20;  // more is shared by several cores
        if (const char* text = std::getenv("PSM_CPU_L2_KB")) {
            char* end;
            const long kb = std::strtol(text, &end, 10);
            if (end == text || *end || kb < 128 || kb > 1 << 16)
                refuse("PSM_CPU_L2_KB", "'" + std::string(text) + "'", "a number from 128 to 65536");
            return int64_t(kb) << 10;
        }
        long system = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
        system = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return system > 0 ? std::min<int64_t>(system, kMost) : kUsual;
    }();
    return bytes;
}

}  // namespace psm::cpu
