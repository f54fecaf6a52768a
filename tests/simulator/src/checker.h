// Shared-memory checks: undefined reads, races between warps and engines, missing proxy fences.
// Happens-before by vector clocks (order.h). An agent is whatever makes accesses of its own time: a warp,
// its cp.async and bulk groups, the wgmma of a warpgroup, the transfers an mbarrier announces.
//
// The lanes of a warp share its clock. What one lane releases by itself covers its own accesses and those
// of the others up to their last bar.warp.sync (or barrier of the CTA): the lane has a place of its own in
// the clocks for the former.
#pragma once

#include "machine.h"

namespace sim {

uint32_t new_agent(Cluster& cluster, AgentKind kind, uint32_t rank, uint32_t index);
inline uint32_t agent_of(const Warp& warp, WarpAgent which) {
    return warp.agent + which;
}

// What the lanes did so far happens before what acquires `into`.
void release(Warp& warp, uint32_t lanes, Order& into);
// Only what engines have completed and mbarriers that are fenced: no order of the warps' own accesses.
void release_completions(Warp& warp, Order& into);
void acquire(Warp& warp, const Order& from);
// An engine takes over at the issue: its snapshot of what the lanes know.
void fork(Warp& warp, uint32_t lanes, Order& into);
// What of it an engine's completion makes known to those who wait for it.
Order completions_of(const Cluster& cluster, const Order& order);
void fence_proxy_async(Warp& warp, uint32_t lanes, bool shared, bool global);
// All lanes have met: bar.warp.sync orders their accesses, any other meeting completes their loads.
void meet_in_order(Warp& warp);
void meet_in_time(Warp& warp);

// A moment of an agent: of a warp also the lane, and whether it is a load.
struct Moment {
    uint32_t agent, time;
    uint32_t lane = 0;
    bool of_warp = false, is_read = false;
    const LaneAgents* lanes = nullptr;
};
inline bool known(const Clock& clock, const Moment& m) {
    if (clock_at(clock, m.agent) >= m.time) {
        return true;
    }
    return m.of_warp && ((m.is_read && clock_at(clock, m.agent + kReads) >= m.time) ||
                         (m.lanes != nullptr && (*m.lanes)[m.lane] != kNone &&
                          clock_at(clock, (*m.lanes)[m.lane]) >= m.time));
}

struct Access {
    Cluster* cluster;
    Cta* cta;  // whose shared memory
    uint32_t offset, size;
    uint32_t agent, time;
    const Clock* clock;
    const Clock* proxy;  // null for the generic proxy
    int line;
    uint32_t lane = 0;
    Level level = kWeak;  // of a strong access
};
void check_read(const Access& access);
void check_write(const Access& access);

// The generic accesses of a warp.
void generic_read(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, const Op& op, int lane);
void generic_write(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, const Op& op, int lane);

std::string describe_agent(const AgentInfo& info, bool in_cluster);

}  // namespace sim
