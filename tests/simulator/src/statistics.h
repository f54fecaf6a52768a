// Counts of a launch. Never a speed.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "program.h"

namespace sim {

struct Statistics {
    using Counts = OpCounts;
    Counts instructions{};                  // warp instructions by class
    std::map<std::string, Counts> by_role;  // "warpgroup 0" ...
    std::map<std::string, uint64_t> wgmma;  // by shape and types
    std::map<std::string, uint64_t> bytes;  // by path: "global load", "tma load" ...
    uint64_t warp_instructions = 0;
    uint64_t barrier_waits = 0;

    void add(const Statistics& other);
    std::string json() const;
};

}  // namespace sim
