// What happened before what, by vector clocks.
//
// Within a cluster an agent (a warp, an engine that works for it) has a place in a dense vector. What is
// known of other clusters is a table that is shared until somebody learns more, for it rarely changes.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace sim {

using Clock = std::vector<uint32_t>;                       // by agent of a cluster
using FarClock = std::vector<std::pair<uint64_t, Clock>>;  // by cluster, in order
using Far = std::shared_ptr<const FarClock>;               // null: nothing

struct Order {
    Clock clock;         // what happened before
    Clock shared_proxy;  // of that, the ordinary accesses that fence.proxy.async made known to engines: to
    Clock global_proxy;  // those that use shared memory, and global memory
    Far far, far_proxy;  // clock and global_proxy of other clusters
    uint64_t grids = 0;  // a bit for each earlier grid of the chain that is known to be complete
};

// The agents of a warp, from its first one on.
enum WarpAgent : uint32_t {
    kGeneric,     // its own accesses
    kCopies,      // cp.async
    kBulkReads,   // shared memory that its bulk stores read
    kBulkWrites,  // global memory that they write
    kInits,       // mbarriers that it has initialized and fenced
    kReads,       // of its own accesses, the loads that a meeting of its lanes completed
    kWarpAgents
};

inline uint32_t clock_at(const Clock& clock, uint32_t agent) {
    return agent < clock.size() ? clock[agent] : 0;
}
void set_clock(Clock& clock, uint32_t agent, uint32_t time);
void join_clock(Clock& into, const Clock& from);
void join_far(Far& into, const Far& from);
void join(Order& into, const Order& from);

// The clock of a cluster in the table; null when nothing is known of it.
const Clock* find_far(const Far& far, uint64_t cluster);
// The table with what the cluster itself knows added.
Far with_cluster(const Far& far, uint64_t cluster, const Clock& clock);

}  // namespace sim
