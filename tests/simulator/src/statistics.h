// Counts of a launch, and the events of its timeline. Never a speed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace sim {

struct Statistics {
    using Counts = std::array<uint64_t, static_cast<size_t>(OpClass::kCount)>;
    Counts instructions{};                  // warp instructions by class
    std::map<std::string, Counts> by_role;  // "warpgroup 0" ...
    std::map<std::string, uint64_t> wgmma;  // by shape and types
    std::map<std::string, uint64_t> bytes;  // by path: "global load", "tma load" ...
    uint64_t warp_instructions = 0;
    uint64_t barrier_waits = 0;

    void add(const Statistics& other);
    std::string json() const;
};

struct TimelineEvent {
    std::string name;
    std::string category;
    uint64_t begin = 0, end = 0;  // in warp instructions, a logical time
    uint64_t cta = 0;
    uint32_t warp = 0;
};

std::string timeline_json(const std::vector<TimelineEvent>& events);

}  // namespace sim
