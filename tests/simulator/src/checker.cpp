#include "checker.h"

#include <algorithm>

#include "errors.h"
#include "launch.h"

namespace sim {
namespace {

std::string name_agent(const Cluster& cluster, uint32_t agent) {
    return describe_agent(cluster.agent_infos[agent], cluster.ctas.size() > 1);
}

[[noreturn]] void report_race(const Access& access, uint32_t word, Epoch other, const char* mine,
                              const char* theirs) {
    throw SimError(
        ErrorKind::kRace,
        format("shared memory 0x%x is %s by %s (PTX line %d) and %s by %s (PTX line %d) with "
               "nothing that orders the two",
               kSharedBase + word * 4, theirs, name_agent(*access.cluster, agent_of(other)).c_str(),
               line_of(other), mine, name_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

[[noreturn]] void report_overwritten_barrier(const Access& access, uint32_t word) {
    throw SimError(
        ErrorKind::kBarrier,
        format("shared memory 0x%x holds a live mbarrier and is overwritten by %s (PTX line %d)",
               kSharedBase + word * 4, name_agent(*access.cluster, access.agent).c_str(), access.line),
        access.line);
}

bool is_async_store(const Cluster& cluster, uint32_t agent) {
    return cluster.agent_infos[agent].kind == AgentKind::kAsyncStore;
}

bool is_generic(const Cluster& cluster, uint32_t agent) {
    const AgentKind kind = cluster.agent_infos[agent].kind;
    return kind == AgentKind::kWarp || kind == AgentKind::kCpAsync || kind == AgentKind::kAsyncStore;
}

Moment moment_of(const Access& access, Epoch epoch, bool is_read) {
    const AgentInfo& info = access.cluster->agent_infos[agent_of(epoch)];
    return {agent_of(epoch), time_of(epoch), lane_of(epoch), info.kind == AgentKind::kWarp,
            is_read,         info.lanes};
}

// Strong accesses that reach each other's thread may meet at any time.
bool both_strong(const Access& access, Epoch other) {
    const uint32_t level = std::min(level_of(other), static_cast<uint32_t>(access.level));
    if (level == kWeak || level >= kClusterLevel) {
        return level != kWeak;
    }
    const auto& infos = access.cluster->agent_infos;
    if (is_async_store(*access.cluster, agent_of(other)) || is_async_store(*access.cluster, access.agent)) {
        return false;  // they come from another CTA
    }
    return infos[agent_of(other)].rank == infos[access.agent].rank;
}

bool ordered(const Access& access, Epoch other, bool is_read) {
    const uint32_t agent = agent_of(other);
    // Nothing orders the st.async of one phase: nobody knows of any before all are done.
    const bool in_order = agent == access.agent && !is_async_store(*access.cluster, agent);
    if (in_order && (access.time == time_of(other) || is_generic(*access.cluster, agent))) {
        return true;
    }
    return known(*access.clock, moment_of(access, other, is_read)) || both_strong(access, other);
}

void check_proxy(const Access& access, uint32_t word, Epoch writer) {
    const uint32_t agent = agent_of(writer);
    const Cluster& cluster = *access.cluster;
    const bool excused =
        cluster.agent_infos[agent].kind == AgentKind::kCpAsync && !cluster.launch->config.cp_async_fence;
    if (access.proxy == nullptr || !is_generic(cluster, agent) || excused ||
        known(*access.proxy, moment_of(access, writer, false))) {
        return;
    }
    throw SimError(
        ErrorKind::kProxyFence,
        format("shared memory 0x%x was written by %s (PTX line %d, generic proxy) and is used by %s "
               "(PTX line %d, async proxy) without fence.proxy.async in between",
               kSharedBase + word * 4, name_agent(*access.cluster, agent).c_str(), line_of(writer),
               name_agent(*access.cluster, access.agent).c_str(), access.line),
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
               name_agent(*access.cluster, access.agent).c_str(), access.line),
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
    if (!ordered(access, writer, false)) {
        report_race(access, word, writer, mine, "written");
    }
    check_proxy(access, word, writer);
    memo.writer = writer;
}

void add_reader(SharedShadow& shadow, const Access& access, uint32_t word, Epoch mine) {
    for (Epochs& slot : shadow.readers) {
        const Epoch other = slot[word];
        if (other == 0 || agent_of(other) == access.agent ||
            known(*access.clock, moment_of(access, other, true))) {
            slot[word] = mine;
            return;
        }
    }
    // More concurrent readers than slots: the newest replaces one at random by address.
    shadow.readers[(access.agent + word) % SharedShadow::kReaders][word] = mine;
}

}  // namespace

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
    const Epoch mine = make_epoch(access.agent, access.time, access.lane, access.level, access.line);
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
    const Epoch mine = make_epoch(access.agent, access.time, access.lane, access.level, access.line);
    for (uint32_t word = first; word <= last; ++word) {
        order_after_write(access, word, shadow.writer[word], memo, "written");
        for (size_t slot = 0; slot < SharedShadow::kReaders; ++slot) {
            const Epoch reader = shadow.readers[slot][word];
            if (reader == 0 || reader == memo.readers[slot]) {
                continue;
            }
            if (!ordered(access, reader, true)) {
                report_race(access, word, reader, "written", "read");
            }
            memo.readers[slot] = reader;
        }
        shadow.writer[word] = mine;
        for (Epochs& slot : shadow.readers) {
            slot[word] = 0;
        }
    }
}

void generic_read(Warp& w, Cta& cta, uint32_t offset, uint32_t size, const Op& op, int lane) {
    w.loaded_since = true;
    check_read({cta.cluster, &cta, offset, size, w.agent, w.order.clock[w.agent], &w.order.clock, nullptr,
                op.line, static_cast<uint32_t>(lane), op.level});
}

void generic_write(Warp& w, Cta& cta, uint32_t offset, uint32_t size, const Op& op, int lane) {
    check_write({cta.cluster, &cta, offset, size, w.agent, w.order.clock[w.agent], &w.order.clock, nullptr,
                 op.line, static_cast<uint32_t>(lane), op.level});
}

std::string describe_agent(const AgentInfo& info, bool in_cluster) {
    const std::string where =
        in_cluster ? " of the cluster's CTA " + std::to_string(info.rank) : std::string();
    switch (info.kind) {
        case AgentKind::kCpAsync:
            return format("cp.async of warp %u%s", info.index, where.c_str());
        case AgentKind::kBulkRead:
        case AgentKind::kBulkWrite:
            return format("a bulk store of warp %u%s", info.index, where.c_str());
        case AgentKind::kWgmma:
            return format("wgmma of warpgroup %u%s", info.index, where.c_str());
        case AgentKind::kAsyncStore:
            return format("a store announced on mbarrier 0x%x%s", info.index, where.c_str());
        case AgentKind::kTransfer:
            return format("a transfer announced on mbarrier 0x%x%s", info.index, where.c_str());
        default:
            return format("warp %u%s", info.index, where.c_str());
    }
}

}  // namespace sim
