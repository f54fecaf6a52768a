#include "barriers.h"

#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "launch.h"
#include "warp_sync.h"

namespace sim {
namespace {

constexpr uint32_t kAllWarps = 0;  // NamedBarrier::expected

void complete_if_full(Cta& cta, NamedBarrier& barrier) {
    const uint32_t expected = barrier.expected == kAllWarps ? cta.warps_alive * kLanes : barrier.expected;
    if (barrier.arrived == 0 || barrier.arrived < expected) {
        return;
    }
    barrier.done_votes = barrier.votes;
    barrier.done_voters = barrier.voters;
    barrier.done_time = barrier.time;
    join(barrier.done, barrier.order);
    barrier.arrived = barrier.votes = barrier.voters = 0;
    barrier.expected = kAllWarps;
    ++barrier.generation;
    ++cta.cluster->progress;
}

uint32_t read_uniform(const Warp& w, const Op& op, Ref ref, uint32_t mask, const char* what) {
    const uint32_t* values = source<uint32_t>(w, ref);
    const uint32_t value = values[first_lane(mask)];
    for (int i = 0; i < kLanes; ++i) {
        if (in_mask(mask, i) && values[i] != value) {
            throw SimError(ErrorKind::kBarrier, format("%s differs between the lanes of a warp", what),
                           op.line);
        }
    }
    return value;
}

void arrive(Warp& w, const Op& op, uint32_t lanes, uint32_t id, uint32_t threads) {
    Cta& cta = *w.cta;
    NamedBarrier& barrier = cta.barriers[id];
    if (threads != kAllWarps && (threads % kLanes != 0 || threads > cta.warps.size() * kLanes)) {
        throw SimError(ErrorKind::kBarrier,
                       format("barrier %u: %u threads is no multiple of 32 within the CTA's %zu", id, threads,
                              cta.warps.size() * kLanes),
                       op.line);
    }
    if (barrier.arrived != 0 && barrier.expected != threads) {
        throw SimError(ErrorKind::kBarrier,
                       format("barrier %u: this warp expects %u threads, one that arrived before expects %u",
                              id, threads, barrier.expected),
                       op.line);
    }
    barrier.expected = threads;
    barrier.arrived += kLanes;
    if (op.q != kNone) {
        barrier.votes += static_cast<uint32_t>(__builtin_popcount(predicate(w, op.q) & lanes));
        barrier.voters += static_cast<uint32_t>(__builtin_popcount(lanes));
    }
    if (threads != kAllWarps && barrier.arrived > threads) {
        throw SimError(ErrorKind::kBarrier,
                       format("barrier %u: more than the expected %u threads arrived", id, threads), op.line);
    }
    barrier.time = std::max(barrier.time, w.time);
    release(w, lanes, barrier.order);
    meet_in_order(w);
    ++cta.cluster->progress;
    complete_if_full(cta, barrier);
}

void deliver_vote(Warp& w, const Op& op, const NamedBarrier& barrier, uint32_t lanes) {
    if (op.code2 == 0) {
        return;
    }
    if (op.code2 == 1) {  // popc
        uint32_t values[kLanes];
        std::fill(values, values + kLanes, barrier.done_votes);
        merge(destination<uint32_t>(w, op.d), values, lanes);
        return;
    }
    const bool result = op.code2 == 2 ? barrier.done_votes == barrier.done_voters : barrier.done_votes != 0;
    set_predicate(w, op.p, result ? kAllLanes : 0, lanes);
}

// code: 0 sync, 1 arrive; code2: reduction
Step named_barrier(Warp& w, const Op& op, uint32_t) {
    if (w.fragment().wait.kind == WaitKind::kNamedBarrier) {
        const NamedBarrier& barrier = w.cta->barriers[w.fragment().wait.address];
        acquire(w, barrier.done);
        wait_until(w, barrier.done_time, "barrier", w.fragment().wait.address, op.line);
        w.fragment().wait = Wait{};
        deliver_vote(w, op, barrier, w.fragment().mask);
        return Step::kNext;
    }
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    const uint32_t id = read_uniform(w, op, op.a, lanes, "the barrier's number");
    const uint32_t threads = op.b == kNone ? kAllWarps : read_uniform(w, op, op.b, lanes, "the thread count");
    if (id > 15) {
        throw SimError(ErrorKind::kBarrier, format("barrier %u: the barriers are 0 to 15", id), op.line);
    }
    if (op.b != kNone && threads == 0) {
        throw SimError(ErrorKind::kBarrier, format("barrier %u: a thread count of 0", id), op.line);
    }
    const uint64_t generation = w.cta->barriers[id].generation;
    arrive(w, op, lanes, id, threads);
    if (op.code == 1) {
        return Step::kNext;
    }
    Wait& wait = w.fragment().wait;
    wait = Wait{};
    wait.kind = WaitKind::kNamedBarrier;
    wait.address = id;
    wait.phase = generation;
    return Step::kBlocked;
}

Step warp_barrier(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    const uint32_t members = source<uint32_t>(w, op.a)[first_lane(mask)];
    if (!meet(w, op, members, &joint)) {
        return Step::kBlocked;
    }
    meet_in_order(w);
    return Step::kNext;
}

void decode_reduction(Decoder& d) {
    const std::string kind = d.take_any({"popc", "and", "or"});
    d.op.code2 = kind == "popc" ? 1 : kind == "and" ? 2 : 3;
    d.take_type();
    d.need_operands(3, 4);
    if (kind == "popc") {
        d.op.d = d.dest(d.operand(0), 4);
    } else {
        d.op.p = d.pred_dest(d.operand(0));
    }
    d.op.a = d.src(d.operand(1), Type::kU32);
    if (d.operand_count() == 4) {
        d.op.b = d.src(d.operand(2), Type::kU32);
    }
    d.op.q = d.pred_src(d.operand(d.operand_count() - 1));
    d.op.run = named_barrier;
}

Step cluster_arrive(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    Cluster& cluster = *w.cta->cluster;
    if (w.cluster_arrived) {
        throw SimError(ErrorKind::kBarrier, "barrier.cluster.arrive twice without a wait in between",
                       op.line);
    }
    w.cluster_arrived = true;
    w.cluster_arrival_time = w.time;
    w.cluster_generation = cluster.barrier_generation;
    if (op.code2 == 0) {
        release(w, lanes, cluster.barrier_order);
        meet_in_order(w);
    } else {
        release_completions(w, cluster.barrier_order);
    }
    ++cluster.progress;
    settle_cluster_barrier(cluster);
    return Step::kNext;
}

Step cluster_wait(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    Cluster& cluster = *w.cta->cluster;
    const bool fresh = cluster.barrier_generation > w.cluster_generation;
    if (!w.cluster_arrived) {
        throw SimError(ErrorKind::kBarrier, "barrier.cluster.wait without an arrive before it", op.line);
    }
    if (!fresh) {
        Wait& wait = w.fragment().wait;
        wait = Wait{};
        wait.kind = WaitKind::kClusterBarrier;
        wait.phase = w.cluster_generation;
        return Step::kBlocked;
    }
    w.fragment().wait = Wait{};
    w.cluster_arrived = false;
    acquire(w, cluster.barrier_done);
    wait_until(w, cluster.barrier_done_time, "cluster barrier", 0, op.line);
    return Step::kNext;
}

void decode_cluster_barrier(Decoder& d) {
    const bool arrive_only = d.take_any({"arrive", "wait"}) == "arrive";
    d.op.code2 = d.take_any({"release", "relaxed", "acquire"}, "") == "relaxed";
    d.take("aligned");
    d.need_operands(0, 0);
    d.op.run = arrive_only ? cluster_arrive : cluster_wait;
}

void decode_bar(Decoder& d) {
    d.op.op_class = OpClass::kBarrier;
    d.op.dataflow = Dataflow::kRequire;
    if (d.take("cluster")) {
        decode_cluster_barrier(d);
        return;
    }
    if (d.take("warp")) {
        d.take_any({"sync"});
        d.need_operands(1, 1);
        d.op.a = d.src(d.operand(0), Type::kB32);
        d.op.code = 0xbeef;
        d.op.run = warp_barrier;
        return;
    }
    d.take("cta");
    const std::string kind = d.take_any({"sync", "arrive", "red"});
    d.take("aligned");
    if (kind == "red") {
        decode_reduction(d);
        return;
    }
    d.need_operands(kind == "arrive" ? 2 : 1, 2);
    d.op.a = d.src(d.operand(0), Type::kU32);
    if (d.operand_count() == 2) {
        d.op.b = d.src(d.operand(1), Type::kU32);
    }
    d.op.code = kind == "arrive";
    d.op.run = named_barrier;
}

}  // namespace

void settle_named_barriers(Cta& cta) {
    for (NamedBarrier& barrier : cta.barriers) {
        if (barrier.expected == kAllWarps) {
            complete_if_full(cta, barrier);
        }
    }
}

void settle_cluster_barrier(Cluster& cluster) {
    bool any = false;
    uint64_t time = 0;
    for (const auto& cta : cluster.ctas) {
        for (const Warp& warp : cta->warps) {
            const bool arrived =
                warp.cluster_arrived && warp.cluster_generation == cluster.barrier_generation;
            if (warp.alive != 0 && !arrived) {
                return;
            }
            any = any || arrived;
            time = std::max(time, arrived ? warp.cluster_arrival_time : 0);
        }
    }
    if (!any) {
        return;
    }
    join(cluster.barrier_done, cluster.barrier_order);
    cluster.barrier_done_time = time;
    ++cluster.barrier_generation;
    ++cluster.progress;
}

void register_barriers(DecodeTable& table) {
    table["bar"] = decode_bar;
    table["barrier"] = decode_bar;
}

}  // namespace sim
