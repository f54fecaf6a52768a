// Shared-memory checks: undefined reads, races between warps and engines, missing proxy fences.
// Happens-before by vector clocks. An agent is whatever makes accesses of its own time: a warp, its
// cp.async and bulk groups, the wgmma of a warpgroup, the transfers an mbarrier announces.
#pragma once

#include "machine.h"

namespace sim {

uint32_t new_agent(Cluster& cluster, AgentKind kind, uint32_t rank, uint32_t index);
uint32_t warp_cp_agent(const Warp& warp);
uint32_t warp_bulk_agent(const Warp& warp);

inline uint32_t clock_at(const Clock& clock, uint32_t agent) {
    return agent < clock.size() ? clock[agent] : 0;
}
void join_clock(Clock& into, const Clock& from);
void set_clock(Clock& clock, uint32_t agent, uint32_t time);

// What a warp did so far happens before what acquires (clock, proxy).
void release(Warp& warp, Clock& clock, Clock& proxy);
void acquire(Warp& warp, const Clock& clock, const Clock& proxy);
// An engine takes over at the issue: its snapshot of the warp's clocks.
void fork(Warp& warp, Clock& clock, Clock& proxy);
void fence_proxy_async(Warp& warp);

struct Access {
    Cluster* cluster;
    Cta* cta;  // whose shared memory
    uint32_t offset, size;
    uint32_t agent, time;
    const Clock* clock;
    const Clock* proxy;  // null for the generic proxy
    int line;
};
void check_read(const Access& access);
void check_write(const Access& access);

// The generic accesses of a warp.
void generic_read(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, int line);
void generic_write(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, int line);

}  // namespace sim
