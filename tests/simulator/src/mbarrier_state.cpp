// The state of mbarriers: counts, phases, what they make known, for instructions and engines alike.
#include <algorithm>

#include "checker.h"
#include "errors.h"
#include "launch.h"
#include "mbarrier.h"

namespace sim {
namespace {

constexpr int64_t kMaxTransaction = kMaxMbarrierCount;

}  // namespace

uint32_t mbarrier_address(const Cta& cta, uint32_t offset) {
    return (cta.rank << kRankShift) + kSharedBase + offset;
}

void complete_phase_if_done(Cta& cta, Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.transaction != 0) {
        return;
    }
    barrier.pending = static_cast<int32_t>(barrier.expected);
    ++barrier.phase;
    barrier.done_time = std::max(barrier.done_time, barrier.time);
    if (cta.cluster->launch->config.check_races) {
        join(barrier.cta_done, barrier.cta_order);
        join(barrier.cluster_done, barrier.cluster_order);
        set_clock(barrier.cta_done.clock, barrier.agent, static_cast<uint32_t>(barrier.phase));
        set_clock(barrier.cluster_done.clock, barrier.agent, static_cast<uint32_t>(barrier.phase));
        // Another CTA's stores: a wait with the scope of the CTA does not reach them.
        if (barrier.store_agent != kNone) {
            set_clock(barrier.cluster_done.clock, barrier.store_agent, static_cast<uint32_t>(barrier.phase));
        }
    }
    ++cta.cluster->progress;
}

void add_transaction(Cta& cta, uint32_t offset, Mbarrier& barrier, int64_t bytes, int line) {
    barrier.transaction += bytes;
    if (barrier.transaction > kMaxTransaction || barrier.transaction < -kMaxTransaction) {
        throw SimError(ErrorKind::kBarrier,
                       format("mbarrier 0x%x: the tx-count %lld is out of range",
                              mbarrier_address(cta, offset), static_cast<long long>(barrier.transaction)),
                       line);
    }
}

void take_arrivals(Cta& cta, uint32_t offset, Mbarrier& barrier, uint32_t count, int line) {
    if (static_cast<int64_t>(count) > barrier.pending) {
        throw SimError(
            ErrorKind::kBarrier,
            format("mbarrier 0x%x (init at PTX line %d): more arrivals than its count of %u in phase %llu "
                   "(%d were pending, %u arrive)",
                   mbarrier_address(cta, offset), barrier.line, barrier.expected,
                   static_cast<unsigned long long>(barrier.phase), barrier.pending, count),
            line);
    }
    barrier.pending -= static_cast<int32_t>(count);
    ++cta.cluster->progress;
}

Mbarrier& mbarrier_at(Cta& cta, uint32_t offset, int line) {
    const auto found = cta.mbarriers.find(offset);
    if (found == cta.mbarriers.end() || !found->second.live) {
        throw SimError(ErrorKind::kBarrier,
                       format("0x%x is no initialized mbarrier", mbarrier_address(cta, offset)), line);
    }
    return found->second;
}

void complete_transfer(Cta& cta, uint32_t offset, uint32_t bytes, uint64_t issued_phase, const Order& order,
                       int line) {
    Mbarrier& barrier = mbarrier_at(cta, offset, line);
    if (barrier.phase != issued_phase) {
        throw SimError(
            ErrorKind::kBarrier,
            format("mbarrier 0x%x: %u bytes land in phase %llu but were issued in phase %llu: "
                   "expect_tx announced fewer bytes than the transfers carry",
                   mbarrier_address(cta, offset), bytes, static_cast<unsigned long long>(barrier.phase),
                   static_cast<unsigned long long>(issued_phase)),
            line);
    }
    add_transaction(cta, offset, barrier, -static_cast<int64_t>(bytes), line);
    if (cta.cluster->launch->config.check_races) {
        const Order completions = completions_of(*cta.cluster, order);
        join(barrier.cta_order, completions);
        join(barrier.cluster_order, completions);
    }
    ++cta.cluster->progress;
    complete_phase_if_done(cta, barrier);
}

void arrive_for(Cta& cta, uint32_t offset, uint32_t count, const Order& order, int line) {
    Mbarrier& barrier = mbarrier_at(cta, offset, line);
    join(barrier.cta_order, order);
    join(barrier.cluster_order, order);
    take_arrivals(cta, offset, barrier, count, line);
    complete_phase_if_done(cta, barrier);
}

void check_init(const Warp& w, const Cta& cta, uint32_t offset, const Mbarrier& barrier, bool by_engine,
                int line) {
    const Clock& clock = w.order.clock;
    const AgentInfo& info = cta.cluster->agent_infos[barrier.init_agent];
    if (clock_at(clock, barrier.init_agent + kInits) >= barrier.init_number) {
        return;
    }
    const Moment init{barrier.init_agent, barrier.init_time, barrier.init_lane, true, false, info.lanes};
    if (barrier.init_agent != w.agent && !known(clock, init)) {
        throw SimError(
            ErrorKind::kRace,
            format("mbarrier 0x%x is initialized by %s (PTX line %d) and used by warp %u (PTX line "
                   "%d) with nothing that orders the two",
                   mbarrier_address(cta, offset), describe_agent(info, cta.cluster->ctas.size() > 1).c_str(),
                   barrier.line, w.index, line),
            line);
    }
    if (by_engine && !known(w.order.shared_proxy, init)) {
        throw SimError(ErrorKind::kProxyFence,
                       format("mbarrier 0x%x was initialized by %s (PTX line %d, generic proxy) and a "
                              "transfer announces itself on it (PTX line %d, async proxy) without "
                              "fence.mbarrier_init or fence.proxy.async in between",
                              mbarrier_address(cta, offset),
                              describe_agent(info, cta.cluster->ctas.size() > 1).c_str(), barrier.line, line),
                       line);
    }
}

void expect_one_more(Cta& cta, uint32_t offset, int line) {
    ++mbarrier_at(cta, offset, line).pending;
}

bool mbarrier_ready(Cta& cta, const Wait& wait) {
    const uint32_t offset = (wait.address & ((1u << kRankShift) - 1)) - kSharedBase;
    const auto found = cta.mbarriers.find(offset);
    if (found == cta.mbarriers.end()) {
        return true;
    }
    const Mbarrier& barrier = found->second;
    return wait.parity == 2 ? barrier.phase > wait.phase : (barrier.phase & 1) != wait.parity;
}

std::string describe_mbarrier(Cta& cta, uint32_t offset) {
    const auto found = cta.mbarriers.find(offset);
    if (found == cta.mbarriers.end()) {
        return "not initialized";
    }
    const Mbarrier& b = found->second;
    std::string text = format("init at PTX line %d, phase %llu, %d of %u arrivals pending, tx-count %lld",
                              b.line, static_cast<unsigned long long>(b.phase), b.pending, b.expected,
                              static_cast<long long>(b.transaction));
    if (b.transaction > 0) {
        text += " bytes expected that no transfer brought";
    } else if (b.transaction < 0) {
        text += ": more bytes arrived than expect_tx announced";
    }
    return text;
}

}  // namespace sim
