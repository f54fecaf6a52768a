// Who learns what: releases, acquires, engines that take over, fences, meetings of lanes.
#include <algorithm>

#include "checker.h"
#include "errors.h"
#include "launch.h"

namespace sim {
namespace {

constexpr size_t kMostAgents = 4095;
constexpr size_t kRoomForOthers = 256;  // of these, lanes leave so many to mbarriers

bool is_own_access(const AgentInfo& info) {
    return info.kind == AgentKind::kWarp || info.kind == AgentKind::kCpAsync ||
           info.kind == AgentKind::kLane || info.kind == AgentKind::kReads;
}

// A lane's place in the clocks; kNone when there are too many agents already.
uint32_t lane_agent(Warp& w, uint32_t lane) {
    uint32_t& agent = (*w.lane_agents)[lane];
    Cluster& cluster = *w.cta->cluster;
    if (agent == kNone && cluster.agent_infos.size() < kMostAgents - kRoomForOthers) {
        agent = new_agent(cluster, AgentKind::kLane, w.cta->rank, w.index);
    }
    return agent;
}

// The warp's own part of `clock` (a copy of its clock) is cut down to what the lanes have a right to.
void restrict_to(Warp& w, uint32_t lanes, Clock& clock, uint32_t before) {
    const uint32_t now = w.order.clock[w.agent];
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        if (((lanes >> lane) & 1) != 0) {
            const uint32_t agent = lane_agent(w, lane);
            if (agent == kNone) {
                return;
            }
            set_clock(clock, agent, now);
        }
    }
    clock[w.agent] = std::max(before, w.ordered_time);
    set_clock(clock, agent_of(w, kReads), w.loaded_time);
}

}  // namespace

uint32_t new_agent(Cluster& cluster, AgentKind kind, uint32_t rank, uint32_t index) {
    cluster.agent_infos.push_back({kind, rank, index, nullptr});
    if (cluster.agent_infos.size() > kMostAgents) {
        throw SimError(ErrorKind::kUnsupported,
                       "more than 4095 agents in a cluster: switch the race check off");
    }
    return static_cast<uint32_t>(cluster.agent_infos.size()) - 1;
}

void release(Warp& w, uint32_t lanes, Order& into) {
    const bool part = (w.alive & ~lanes) != 0;
    const uint32_t before = part ? clock_at(into.clock, w.agent) : 0;
    join(into, w.order);
    if (part) {
        restrict_to(w, lanes, into.clock, before);
    }
    ++w.order.clock[w.agent];
}

void fork(Warp& w, uint32_t lanes, Order& into) {
    into = w.order;
    if ((w.alive & ~lanes) != 0) {
        restrict_to(w, lanes, into.clock, 0);
    }
    ++w.order.clock[w.agent];
}

// Own accesses count as far as fence.proxy.async covers them: then they have reached shared memory, where
// the engines of other CTAs meet them.
Order completions_of(const Cluster& cluster, const Order& order) {
    Order result;
    result.clock = order.clock;
    for (uint32_t i = 0; i < result.clock.size(); ++i) {
        if (is_own_access(cluster.agent_infos[i])) {
            result.clock[i] = std::min(result.clock[i], clock_at(order.shared_proxy, i));
            set_clock(result.shared_proxy, i, result.clock[i]);
        }
    }
    return result;
}

void release_completions(Warp& w, Order& into) {
    join(into, completions_of(*w.cta->cluster, w.order));
}

void acquire(Warp& w, const Order& from) {
    join(w.order, from);
}

void fence_proxy_async(Warp& w, uint32_t lanes, bool shared, bool global) {
    Order now;
    fork(w, lanes, now);
    if (shared) {
        join_clock(w.order.shared_proxy, now.clock);
    }
    if (global) {
        join_clock(w.order.global_proxy, now.clock);
        join_far(w.order.far_proxy, now.far);
    }
}

void meet_in_order(Warp& w) {
    w.ordered_time = w.loaded_time = w.order.clock[w.agent];
    w.loaded_since = false;
    ++w.order.clock[w.agent];
}

void meet_in_time(Warp& w) {
    if (w.loaded_since) {
        w.loaded_since = false;
        w.loaded_time = w.order.clock[w.agent];
        ++w.order.clock[w.agent];
    }
}

}  // namespace sim
