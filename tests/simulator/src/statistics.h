// Counts of a launch. Never a speed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "program.h"
#include "shared_counts.h"

namespace sim {

struct InstructionCounts {
    std::string opcode;
    SharedCounts counts;
};

struct Statistics {
    using Counts = OpCounts;
    Counts instructions{};                  // warp instructions by class
    std::map<std::string, Counts> by_role;  // "warpgroup 0" ...
    std::map<std::string, uint64_t> wgmma;  // by shape and types
    std::map<std::string, uint64_t> bytes;  // by path: "global load", "tma load" ...
    SharedCounts shared;
    std::map<int, InstructionCounts> shared_by_line;  // of a launch, and by CTA
    std::map<std::array<uint32_t, 3>, SharedCounts> shared_by_cta;
    uint64_t warp_instructions = 0;
    uint64_t barrier_waits = 0;

    void add(const Statistics& other);
    // `places`: with what is known by PTX line and by CTA, which means nothing for several launches.
    std::string json(bool places) const;
};

}  // namespace sim
