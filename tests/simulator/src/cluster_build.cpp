// The start of CTAs and the end of warps.
#include <algorithm>

#include "barriers.h"
#include "checker.h"
#include "cluster_run.h"
#include "launch.h"
#include "scheduler.h"

namespace sim {
namespace {

Dim3 unflatten(uint64_t ordinal, const Dim3& extent) {
    Dim3 index;
    index.x = static_cast<uint32_t>(ordinal % extent.x);
    index.y = static_cast<uint32_t>(ordinal / extent.x % extent.y);
    index.z = static_cast<uint32_t>(ordinal / (uint64_t{extent.x} * extent.y));
    return index;
}

void init_warp(Warp& w, Cta& cta, uint32_t index, const Launch& launch) {
    const Program& program = launch.kernel->program;
    w.cta = &cta;
    w.index = index;
    w.program = &program;
    const uint64_t threads = launch.block.count();
    const uint64_t first = uint64_t{index} * kLanes;
    w.alive = threads - first >= kLanes ? kAllLanes : (1u << (threads - first)) - 1;
    w.register_storage.resize(program.register_bytes + 64);
    w.pred_storage.assign(program.predicate_count, 0);
    w.pred_storage[kPredTrue] = kAllLanes;
    w.local_storage.resize(uint64_t{program.local_bytes} * kLanes);
    const uint64_t raw = reinterpret_cast<uint64_t>(w.register_storage.data());
    w.base[0] = reinterpret_cast<uint8_t*>((raw + 63) & ~uint64_t{63});
    w.base[1] = const_cast<uint8_t*>(program.constants.data());
    w.preds = w.pred_storage.data();
    w.registers_per_thread = launch.kernel->registers_at_launch;
    Fragment fragment;
    fragment.mask = w.alive;
    w.fragments.push_back(fragment);
    const size_t slots = program.register_bytes / 64;
    w.defined.assign(slots, 0);
    // Scratch slots hold moved symbols: always defined.
    std::fill(w.defined.end() - 32, w.defined.end(), kAllLanes);
    w.pred_defined.assign(program.predicate_count, 0);
    w.pred_defined[kPredTrue] = w.pred_defined[kPredFalse] = kAllLanes;
    w.in_flight.assign(slots, 0);
    w.being_read.assign(slots, 0);
    w.written_at.assign(slots, 0);
}

void init_agents(Cluster& cluster) {
    for (auto& cta : cluster.ctas) {
        for (Warp& w : cta->warps) {
            static const AgentKind kinds[kWarpAgents] = {AgentKind::kWarp,     AgentKind::kCpAsync,
                                                         AgentKind::kBulkRead, AgentKind::kBulkWrite,
                                                         AgentKind::kInits,    AgentKind::kReads};
            w.agent = static_cast<uint32_t>(cluster.agent_infos.size());
            for (const AgentKind kind : kinds) {
                new_agent(cluster, kind, cta->rank, w.index);
            }
            w.lane_agents = std::make_shared<LaneAgents>();
            w.lane_agents->fill(kNone);
            cluster.agent_infos[w.agent].lanes = w.lane_agents.get();
            set_clock(w.order.clock, w.agent, 1);
        }
        for (size_t g = 0; g < cta->warpgroups.size(); ++g) {
            cta->warpgroups[g]->agent =
                new_agent(cluster, AgentKind::kWgmma, cta->rank, static_cast<uint32_t>(g));
        }
    }
}

void init_cta(Cta& cta, Cluster& cluster, const Launch& launch) {
    cta.cluster = &cluster;
    const uint32_t bytes = launch.kernel->static_shared_bytes + launch.dynamic_shared;
    cta.shared.assign((bytes + 15) / 16 * 16, 0xff);  // NaN in every format
    cta.shadow.allocate(static_cast<uint32_t>(cta.shared.size()), launch.config.check_races);
    const uint32_t warps = launch.warps_per_cta();
    cta.warps.resize(warps);
    cta.warps_alive = warps;
    cta.register_pool = uint64_t{launch.kernel->registers_at_launch} * warps * kLanes;
    for (uint32_t i = 0; i < warps; ++i) {
        init_warp(cta.warps[i], cta, i, launch);
    }
    for (uint32_t i = 0; i + 4 <= warps; i += 4) {
        auto group = std::make_unique<Warpgroup>();
        for (uint32_t j = 0; j < 4; ++j) {
            group->warps[j] = &cta.warps[i + j];
            cta.warps[i + j].warpgroup = group.get();
        }
        cta.warpgroups.push_back(std::move(group));
    }
}

}  // namespace

std::unique_ptr<Cluster> make_cluster(Launch& launch, uint64_t ordinal) {
    auto cluster = std::make_unique<Cluster>();
    cluster->launch = &launch;
    cluster->ordinal = launch.first_cluster + ordinal;
    cluster->number = ordinal;
    cluster->random_state =
        (launch.config.seed * 0x9E3779B97F4A7C15ull) ^ ((ordinal + 1) * 0xD1B54A32D192ED03ull);
    cluster->random_state |= 1;
    for (int i = 0; i < 8; ++i) {
        cluster->random();
    }
    const Dim3 clusters{launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                        launch.grid.z / launch.cluster.z};
    cluster->index = unflatten(ordinal, clusters);
    for (uint32_t rank = 0; rank < launch.cluster.count(); ++rank) {
        auto cta = std::make_unique<Cta>();
        const Dim3 inside = unflatten(rank, launch.cluster);
        cta->rank = rank;
        cta->index = {cluster->index.x * launch.cluster.x + inside.x,
                      cluster->index.y * launch.cluster.y + inside.y,
                      cluster->index.z * launch.cluster.z + inside.z};
        init_cta(*cta, *cluster, launch);
        cluster->ctas.push_back(std::move(cta));
    }
    for (auto& cta : cluster->ctas) {
        for (Warp& warp : cta->warps) {
            cluster->warps.push_back(&warp);
        }
    }
    init_agents(*cluster);
    return cluster;
}

void allow_dependents(Cta& cta) {
    if (!cta.allows_dependents) {
        cta.allows_dependents = true;
        ++cta.cluster->launch->allowing_ctas;
        ++cta.cluster->progress;
    }
}

void on_warp_exit(Warp& w) {
    Cta& cta = *w.cta;
    Cluster& cluster = *cta.cluster;
    --cta.warps_alive;
    ++cluster.progress;
    if (cta.warps_alive == 0) {
        allow_dependents(cta);
    }
    settle_named_barriers(cta);
    settle_cluster_barrier(cluster);
    if (cta.warps_alive != 0 || !cluster.launch->config.check_races) {
        return;
    }
    for (Warp& warp : cta.warps) {
        if (warp.open_bulk_group) {
            cluster.running = &warp;
            throw SimError(
                ErrorKind::kRace,
                format("the CTA exits but warp %u never committed (cp.async.bulk.commit_group) its "
                       "last bulk stores, so no wait covers that they have read shared memory",
                       warp.index),
                warp.last_bulk_store_line);
        }
        if (warp.bulk_reads_waited < warp.bulk_groups_committed) {
            cluster.running = &warp;  // whom the message names
            throw SimError(
                ErrorKind::kRace,
                format("the CTA exits but warp %u never waited (cp.async.bulk.wait_group) for its last bulk "
                       "stores to have read shared memory",
                       warp.index),
                warp.last_bulk_store_line);
        }
    }
}

namespace {

void collect_shared(const Cta& cta, const Program& program, Statistics& into) {
    SharedCounts sum;
    for (size_t i = 0; i < cta.shared_counts.size(); ++i) {
        const SharedCounts& counts = cta.shared_counts[i];
        if (counts.executed != 0) {
            sum.add(counts);
            InstructionCounts& instruction = into.shared_by_line[program.ops[i].line];
            instruction.opcode = program.names[i];
            instruction.counts.add(counts);
        }
    }
    if (sum.executed != 0) {
        into.shared.add(sum);
        into.shared_by_cta[{cta.index.x, cta.index.y, cta.index.z}].add(sum);
    }
}

}  // namespace

void collect_statistics(Cluster& cluster) {
    static const char* const paths[] = {"global load",   "global store", "shared load", "shared store",
                                        "atomic",        "cp.async",     "tensor load", "tensor store",
                                        "tensor reduce", "bulk load",    "bulk store",  "bulk reduce"};
    Statistics local;
    for (const auto& cta : cluster.ctas) {
        for (const Warp& warp : cta->warps) {
            Statistics::Counts& role = local.by_role["warpgroup " + std::to_string(warp.index / 4)];
            for (size_t i = 0; i < role.size(); ++i) {
                role[i] += warp.counts[i];
                local.instructions[i] += warp.counts[i];
            }
            local.warp_instructions += warp.executed;
        }
        collect_shared(*cta, cluster.launch->kernel->program, local);
    }
    for (size_t i = 0; i < std::size(paths); ++i) {
        if (cluster.bytes[i] != 0) {
            local.bytes[paths[i]] += cluster.bytes[i];
        }
    }
    local.wgmma = cluster.wgmma_counts;
    Launch& launch = *cluster.launch;
    const std::lock_guard<std::mutex> lock(launch.mutex);
    launch.statistics.add(local);
    launch.timeline.insert(launch.timeline.end(), cluster.timeline.begin(), cluster.timeline.end());
}

}  // namespace sim
