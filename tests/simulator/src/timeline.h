// The timeline of a launch: what each warp and engine did, in a logical time.
//
// A warp's clock counts its instructions, and jumps forward where it waits for somebody whose clock is
// ahead. The tensor cores of a CTA take one wgmma at a time, each for the cycles that its multiply-adds
// take at full rate; copies take none. That orders the events for a picture; it is no speed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace sim {

struct AsyncItem;
struct Cluster;
struct Warp;
struct WgmmaItem;

struct TimelineEvent {
    std::string name;
    const char* category;
    uint64_t begin = 0, end = 0;
    uint64_t cta = 0;
    uint32_t warp = 0;
    std::string details;  // JSON members: "line": 12, "float": 3
};

// A stretch of instructions without a wait: where it began, and the warp's counts there.
struct RunStart {
    uint64_t time = 0;
    OpCounts counts{};
};
void begin_run(Warp& warp);
void end_run(Warp& warp);  // an event, with the instructions by class

// The warp's clock is at least `until`: it waited so long, at a PTX line, for a barrier of this number.
void wait_until(Warp& warp, uint64_t until, const char* what, uint32_t number, int line);

// When the tensor cores of the CTA begin with the product that the warp issues, and when they end.
void occupy_tensor_cores(Warp& warp, const WgmmaShape& shape, WgmmaItem& item);

// From the issue of a copy to its end.
void record_engine(Cluster& cluster, const AsyncItem& item);

std::string timeline_json(const std::vector<TimelineEvent>& events);

}  // namespace sim
