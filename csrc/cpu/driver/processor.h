// What this machine's processor does fast: decided once, at first use.
#pragma once

#include <cstdint>
#include <string>

namespace psm::cpu {

struct Processor {
    std::string isa;  // the one of instruction_sets() that is used
    std::string why;
};
const Processor& processor();

// What would be chosen for another processor that runs what this one does.
Processor choose_for(const std::string& vendor, int family, int model);

// What bank tiles and query groups are cut for: PSM_CPU_L2_KB, else what the system says.
int64_t l2_bytes();

}  // namespace psm::cpu
