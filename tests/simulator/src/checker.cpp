#include "checker.h"

#include <algorithm>

#include "errors.h"
#include "launch.h"

namespace sim {
namespace {

std::string describe_agent(const Cluster& cluster, uint32_t agent) {
    const AgentInfo& info = cluster.agent_infos[agent];
    const char* where = cluster.ctas.size() > 1 ? " of the cluster's CTA " : "";
    const std::string rank = cluster.ctas.size() > 1 ? std::to_string(info.rank) : "";
    switch (info.kind) {
        case AgentKind::kWarp:
            return format("warp %u%s%s", info.index, where, rank.c_str());
        case AgentKind::kCpAsync:
            return format("cp.async of warp %u%s%s", info.index, where, rank.c_str());
        case AgentKind::kBulkRead:
            return format("a bulk store of warp %u%s%s", info.index, where, rank.c_str());
        case AgentKind::kWgmma:
            return format("wgmma of warpgroup %u%s%s", info.index, where, rank.c_str());
        case AgentKind::kTransfer:
            return format("a transfer announced on mbarrier 0x%x%s%s", info.index, where, rank.c_str());
    }
    return "?";
}

[[noreturn]] void report_race(const Access& access, uint32_t word, Epoch other, const char* mine,
                              const char* theirs) {
    throw SimError(
        ErrorKind::kRace,
        format("shared memory 0x%x is %s by %s (PTX line %d) and %s by %s (PTX line %d) with "
               "nothing that orders the two",
               kSharedBase + word * 4, theirs, describe_agent(*access.cluster, agent_of(other)).c_str(),
               line_of(other), mine, describe_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

[[noreturn]] void report_overwritten_barrier(const Access& access, uint32_t word) {
    throw SimError(
        ErrorKind::kBarrier,
        format("shared memory 0x%x holds a live mbarrier and is overwritten by %s (PTX line %d)",
               kSharedBase + word * 4, describe_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

bool is_generic(const Cluster& cluster, uint32_t agent) {
    const AgentKind kind = cluster.agent_infos[agent].kind;
    return kind == AgentKind::kWarp || kind == AgentKind::kCpAsync;
}

bool ordered(const Access& access, Epoch other) {
    const uint32_t agent = agent_of(other);
    return agent == access.agent ? clock_at(*access.clock, agent) >= time_of(other) ||
                                       access.time == time_of(other) || is_generic(*access.cluster, agent)
                                 : clock_at(*access.clock, agent) >= time_of(other);
}

void check_proxy(const Access& access, uint32_t word, Epoch writer) {
    const uint32_t agent = agent_of(writer);
    const Cluster& cluster = *access.cluster;
    const bool excused =
        cluster.agent_infos[agent].kind == AgentKind::kCpAsync && !cluster.launch->config.cp_async_fence;
    if (access.proxy == nullptr || !is_generic(cluster, agent) || excused ||
        clock_at(*access.proxy, agent) >= time_of(writer)) {
        return;
    }
    throw SimError(
        ErrorKind::kProxyFence,
        format("shared memory 0x%x was written by %s (PTX line %d, generic proxy) and is used by %s "
               "(PTX line %d, async proxy) without fence.proxy.async in between",
               kSharedBase + word * 4, describe_agent(*access.cluster, agent).c_str(), line_of(writer),
               describe_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

uint8_t byte_bits(const Access& access, uint32_t word) {
    const uint32_t begin = std::max(access.offset, word * 4) - word * 4;
    const uint32_t end = std::min(access.offset + access.size, word * 4 + 4) - word * 4;
    return static_cast<uint8_t>(((1u << end) - 1) & ~((1u << begin) - 1));
}

void check_written(const Access& access, uint32_t word) {
    const uint8_t needed = byte_bits(access, word);
    if ((access.cta->shadow.written[word] & needed) == needed) {
        return;
    }
    throw SimError(
        ErrorKind::kUninitialized,
        format("shared memory 0x%x is read by %s (PTX line %d) but nobody wrote it", kSharedBase + word * 4,
               describe_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

// Neighbouring words mostly share their history: an epoch found in order once is not looked at again.
struct Memo {
    Epoch writer = 0;
    Epoch readers[SharedShadow::kReaders] = {};
};

void order_after_write(const Access& access, uint32_t word, Epoch writer, Memo& memo, const char* mine) {
    if (writer == 0 || writer == memo.writer) {
        return;
    }
    if (!ordered(access, writer)) {
        report_race(access, word, writer, mine, "written");
    }
    check_proxy(access, word, writer);
    memo.writer = writer;
}

void add_reader(SharedShadow& shadow, const Access& access, uint32_t word, Epoch mine) {
    for (std::vector<Epoch>& slot : shadow.readers) {
        const Epoch other = slot[word];
        if (other == 0 || agent_of(other) == access.agent ||
            clock_at(*access.clock, agent_of(other)) >= time_of(other)) {
            slot[word] = mine;
            return;
        }
    }
    // More concurrent readers than slots: the newest replaces one at random by address.
    shadow.readers[(access.agent + word) % SharedShadow::kReaders][word] = mine;
}

}  // namespace

uint32_t new_agent(Cluster& cluster, AgentKind kind, uint32_t rank, uint32_t index) {
    cluster.agent_infos.push_back({kind, rank, index});
    if (cluster.agent_infos.size() > 4095) {
        throw SimError(ErrorKind::kUnsupported,
                       "more than 4095 agents in a cluster: switch the race check off");
    }
    return static_cast<uint32_t>(cluster.agent_infos.size()) - 1;
}

uint32_t warp_cp_agent(const Warp& warp) {
    return warp.agent + 1;
}
uint32_t warp_bulk_agent(const Warp& warp) {
    return warp.agent + 2;
}

void join_clock(Clock& into, const Clock& from) {
    if (into.size() < from.size()) {
        into.resize(from.size(), 0);
    }
    for (size_t i = 0; i < from.size(); ++i) {
        into[i] = std::max(into[i], from[i]);
    }
}

void set_clock(Clock& clock, uint32_t agent, uint32_t time) {
    if (clock.size() <= agent) {
        clock.resize(agent + 1, 0);
    }
    clock[agent] = std::max(clock[agent], time);
}

void release(Warp& warp, Clock& clock, Clock& proxy) {
    join_clock(clock, warp.clock);
    join_clock(proxy, warp.proxy_clock);
    ++warp.clock[warp.agent];
}

void acquire(Warp& warp, const Clock& clock, const Clock& proxy) {
    join_clock(warp.clock, clock);
    join_clock(warp.proxy_clock, proxy);
}

void fork(Warp& warp, Clock& clock, Clock& proxy) {
    clock = warp.clock;
    proxy = warp.proxy_clock;
    ++warp.clock[warp.agent];
}

void fence_proxy_async(Warp& warp) {
    warp.proxy_clock = warp.clock;
    ++warp.clock[warp.agent];
}

void check_read(const Access& access) {
    const Config& config = access.cluster->launch->config;
    SharedShadow& shadow = access.cta->shadow;
    const uint32_t first = access.offset / 4;
    const uint32_t last = (access.offset + access.size - 1) / 4;
    if (config.check_uninitialized) {
        for (uint32_t word = first; word <= last; ++word) {
            if ((shadow.written[word] & 0xf) != 0xf) {
                check_written(access, word);
            }
        }
    }
    if (!config.check_races) {
        return;
    }
    Memo memo;
    const Epoch mine = make_epoch(access.agent, access.time, access.line);
    for (uint32_t word = first; word <= last; ++word) {
        order_after_write(access, word, shadow.writer[word], memo, "read");
        if (shadow.readers[0][word] != mine) {
            add_reader(shadow, access, word, mine);
        }
    }
}

void check_write(const Access& access) {
    const Config& config = access.cluster->launch->config;
    SharedShadow& shadow = access.cta->shadow;
    const uint32_t first = access.offset / 4;
    const uint32_t last = (access.offset + access.size - 1) / 4;
    for (uint32_t word = first; word <= last; ++word) {
        if ((shadow.written[word] & kMbarrierWord) != 0) {
            report_overwritten_barrier(access, word);
        }
        shadow.written[word] |= byte_bits(access, word);
    }
    if (!config.check_races) {
        return;
    }
    Memo memo;
    const Epoch mine = make_epoch(access.agent, access.time, access.line);
    for (uint32_t word = first; word <= last; ++word) {
        order_after_write(access, word, shadow.writer[word], memo, "written");
        for (size_t slot = 0; slot < SharedShadow::kReaders; ++slot) {
            const Epoch reader = shadow.readers[slot][word];
            if (reader == 0 || reader == memo.readers[slot]) {
                continue;
            }
            if (!ordered(access, reader)) {
                report_race(access, word, reader, "written", "read");
            }
            memo.readers[slot] = reader;
        }
        shadow.writer[word] = mine;
        for (std::vector<Epoch>& slot : shadow.readers) {
            slot[word] = 0;
        }
    }
}

void generic_read(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, int line) {
    check_read(
        {cta.cluster, &cta, offset, size, warp.agent, warp.clock[warp.agent], &warp.clock, nullptr, line});
}

void generic_write(Warp& warp, Cta& cta, uint32_t offset, uint32_t size, int line) {
    check_write(
        {cta.cluster, &cta, offset, size, warp.agent, warp.clock[warp.agent], &warp.clock, nullptr, line});
}

}  // namespace sim
