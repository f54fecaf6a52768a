#include "mbarrier.h"

#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

constexpr int64_t kMaxCount = kMaxMbarrierCount;
constexpr uint64_t kTimeOutOdds = 8;  // one try_wait in so many gives up, under a seed
// One lane's barrier.
struct Located {
    Cta* cta;
    uint32_t offset;
};

Located locate(Warp& w, const Op& op, uint64_t address, int lane) {
    if ((address & 7) != 0) {
        throw SimError(ErrorKind::kMisaligned,
                       format("lane %d: mbarrier address 0x%llx is not aligned to 8 bytes", lane,
                              static_cast<unsigned long long>(address)),
                       op.line);
    }
    Space space = op.space;
    if (space == Space::kGeneric) {
        if (address < kSharedWindow || address >= kLocalWindow) {
            throw SimError(ErrorKind::kOutOfBounds,
                           format("lane %d: mbarrier address 0x%llx is not in shared memory", lane,
                                  static_cast<unsigned long long>(address)),
                           op.line);
        }
        space = Space::kSharedCluster;
    }
    Located located{};
    located.cta = &shared_target(w, static_cast<uint32_t>(address), 8, space == Space::kSharedCluster,
                                 op.line, &located.offset);
    return located;
}

Step init(Warp& w, const Op& op, uint32_t mask) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    const uint32_t* counts = source<uint32_t>(w, op.b);
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const Located at = locate(w, op, addresses[i], i);
        if (counts[i] == 0 || counts[i] > kMaxCount) {
            throw SimError(ErrorKind::kBarrier, format("mbarrier.init with a count of %u", counts[i]),
                           op.line);
        }
        Mbarrier& barrier = at.cta->mbarriers[at.offset];
        if (barrier.live) {
            throw SimError(
                ErrorKind::kBarrier,
                format("mbarrier 0x%x is initialized again (first at PTX line %d) without mbarrier.inval",
                       mbarrier_address(*at.cta, at.offset), barrier.line),
                op.line);
        }
        const uint32_t agent = barrier.agent != kNone
                                   ? barrier.agent
                                   : new_agent(*at.cta->cluster, AgentKind::kTransfer, at.cta->rank,
                                               mbarrier_address(*at.cta, at.offset));
        const uint32_t store_agent = barrier.store_agent;
        const uint64_t phase = barrier.phase;
        const bool reused = barrier.agent != kNone;
        barrier = Mbarrier{};
        barrier.live = true;
        barrier.expected = counts[i];
        barrier.pending = static_cast<int32_t>(counts[i]);
        barrier.agent = agent;
        barrier.store_agent = store_agent;
        barrier.phase = reused ? (phase | 1) + 1 : 0;  // even: phases count on, for the race check's clocks
        barrier.line = op.line;
        barrier.init_agent = w.agent;
        barrier.init_time = w.order.clock[w.agent];
        barrier.init_lane = static_cast<uint32_t>(i);
        barrier.init_number = ++w.inits;
        for (uint32_t word = at.offset / 4; word < at.offset / 4 + 2; ++word) {
            at.cta->shadow.written[word] = 0xf | kMbarrierWord;
        }
    }
    ++w.cta->cluster->progress;
    return Step::kNext;
}

Step inval(Warp& w, const Op& op, uint32_t mask) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const Located at = locate(w, op, addresses[i], i);
        mbarrier_at(*at.cta, at.offset, op.line).live = false;
        for (uint32_t word = at.offset / 4; word < at.offset / 4 + 2; ++word) {
            at.cta->shadow.written[word] = 0;
        }
    }
    return Step::kNext;
}

// The opaque state of mbarrier.arrive: phase and pending count.
uint64_t state_of(const Mbarrier& barrier) {
    return (barrier.phase << 20) | static_cast<uint32_t>(barrier.pending);
}

enum ArriveFlags : uint16_t { kExpectTx = 1, kArrive = 2, kCompleteTx = 4, kDrop = 8, kRelaxed = 16 };

// What a relaxed operation passes on: what fences of that scope before it have released.
Order fenced(const Warp& w, Level scope) {
    Order result;
    for (const Published& released : w.sync.released) {
        if (released.level >= scope) {
            join(result, released.what->order);
        }
    }
    const uint32_t inits = agent_of(w, kInits);  // by fence.mbarrier_init.release.cluster
    set_clock(result.clock, inits, clock_at(w.order.clock, inits));
    return result;
}

// An arrival at a barrier of another CTA orders the warp's accesses only with the scope of the cluster; with
// less, what engines completed for the warp is taken to be over.
void publish_arrival(const Warp& w, const Op& op, const Cta& target, Mbarrier& barrier, const Order& full,
                     const Order& completions) {
    const bool own = &target == w.cta;
    const bool reaches = own || op.level >= kClusterLevel;
    if ((op.code & kRelaxed) == 0) {
        join(barrier.cta_order, own ? full : completions);
        join(barrier.cluster_order, reaches ? full : completions);
    } else if (reaches) {
        const Order before = fenced(w, own ? kCtaLevel : kClusterLevel);
        join(barrier.cta_order, own ? before : Order{});
        join(barrier.cluster_order, before);
    }
}

// arrive, arrive.expect_tx, expect_tx, complete_tx, arrive_drop: op.b is a count or a number of bytes.
Step arrive(Warp& w, const Op& op, uint32_t mask) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    Order full, completions;
    const bool tracks = w.cta->cluster->launch->config.check_races;
    if (tracks) {
        release(w, mask, full);
        completions = completions_of(*w.cta->cluster, full);
    }
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const Located at = locate(w, op, addresses[i], i);
        Mbarrier& barrier = mbarrier_at(*at.cta, at.offset, op.line);
        const uint32_t value = op.b == kNone ? 1 : source<uint32_t>(w, op.b)[i];
        if (op.d != kNone) {
            destination<uint64_t>(w, op.d)[i] = state_of(barrier);
        }
        if ((op.code & (kExpectTx | kCompleteTx)) != 0) {
            const int64_t bytes = static_cast<int32_t>(value);
            add_transaction(*at.cta, at.offset, barrier, (op.code & kExpectTx) != 0 ? bytes : -bytes,
                            op.line);
        }
        if (tracks) {
            check_init(w, *at.cta, at.offset, barrier, false, op.line);
            publish_arrival(w, op, *at.cta, barrier, full, completions);
        }
        barrier.time = std::max(barrier.time, w.time);
        if ((op.code & kArrive) != 0) {
            const uint32_t count = (op.code & kExpectTx) != 0 ? 1 : value;
            if ((op.code & kDrop) != 0) {
                barrier.expected -= count;
            }
            take_arrivals(*at.cta, at.offset, barrier, count, op.line);
        }
        complete_phase_if_done(*at.cta, barrier);
    }
    return Step::kNext;
}

bool phase_passed(const Mbarrier& barrier, bool by_parity, uint64_t token) {
    return by_parity ? (barrier.phase & 1) != (token & 1) : barrier.phase > (token >> 20);
}

// try_wait may return false whenever its time limit has passed, which nobody can foresee.
bool draws_time_out(Cluster& cluster) {
    return cluster.launch->adversarial && cluster.random() % kTimeOutOdds == 0;
}

// A phase that the warp knows to be complete cannot be missed.
bool is_news(const Warp& w, const Mbarrier& barrier) {
    return barrier.phase > clock_at(w.order.clock, barrier.agent);
}

// code: 1 by parity; code2: 1 may suspend (try_wait)
Step wait_op(Warp& w, const Op& op, uint32_t mask) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    const bool by_parity = op.code != 0;
    const bool checks = w.cta->cluster->launch->config.check_races;
    uint32_t done = 0;
    int missing = -1;
    Located missing_at{};
    uint64_t missing_token = 0;
    const bool gives_up = op.code2 != 0 && draws_time_out(*w.cta->cluster);
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const Located at = locate(w, op, addresses[i], i);
        const Mbarrier& barrier = mbarrier_at(*at.cta, at.offset, op.line);
        if (checks) {
            check_init(w, *at.cta, at.offset, barrier, false, op.line);
        }
        const uint64_t token = by_parity ? source<uint32_t>(w, op.b)[i] : source<uint64_t>(w, op.b)[i];
        const bool passed = phase_passed(barrier, by_parity, token);
        if (passed && !(gives_up && is_news(w, barrier))) {
            done |= uint32_t{1} << i;
            if (checks && op.level != kWeak) {
                acquire(w, op.level >= kClusterLevel ? barrier.cluster_done : barrier.cta_done);
            }
            wait_until(w, barrier.done_time, "mbarrier", mbarrier_address(*at.cta, at.offset), op.line);
        } else if (missing < 0) {
            missing = i;
            missing_at = at;
            missing_token = token;
        }
    }
    Wait& wait = w.fragment().wait;
    const bool may_wait = op.code2 != 0 && !gives_up && !(wait.kind == WaitKind::kMbarrier && wait.timed_out);
    if (missing >= 0 && may_wait) {
        wait = Wait{};
        wait.kind = WaitKind::kMbarrier;
        wait.address = mbarrier_address(*missing_at.cta, missing_at.offset);
        wait.phase = by_parity ? 0 : missing_token >> 20;
        wait.parity = by_parity ? static_cast<uint32_t>(missing_token & 1) : 2;
        return Step::kBlocked;
    }
    set_predicate(w, op.p, done, mask);
    wait = Wait{};
    if (missing < 0) {
        return Step::kNext;
    }
    w.fragment().pc += 1;
    return Step::kYield;
}

Step pending_count(Warp& w, const Op& op, uint32_t mask) {
    return map1<uint32_t, uint64_t>(w, op, mask,
                                    [](uint64_t state) { return static_cast<uint32_t>(state & kMaxCount); });
}

Space take_barrier_space(Decoder& d) {
    const Space space = d.take_space();
    if (space != Space::kGeneric && space != Space::kSharedCta && space != Space::kSharedCluster) {
        d.fail("an mbarrier is in shared memory");
    }
    return space;
}

void decode_wait(Decoder& d, bool may_suspend) {
    d.op.code = d.take("parity");
    d.op.code2 = may_suspend;
    const bool relaxed = d.take_any({"acquire", "relaxed"}, "") == "relaxed";
    const bool cluster = d.take_any({"cta", "cluster"}, "") == "cluster";
    d.op.level = relaxed ? kWeak : cluster ? kClusterLevel : kCtaLevel;
    d.op.space = take_barrier_space(d);
    d.take_any({"b64"});
    d.need_operands(3, may_suspend ? 4 : 3);
    d.op.p = d.pred_dest(d.operand(0));
    if (d.op.p == kNone) {
        d.fail("the result is a predicate");
    }
    bool wide = false;
    d.op.b = d.src(d.operand(2), d.op.code != 0 ? Type::kU32 : Type::kB64);
    if (d.operand_count() == 4) {
        d.src(d.operand(3), Type::kU32);  // the time limit of the suspension
    }
    d.op.a = d.address(d.operand(1), &wide);
    d.op.target2 = wide;
    d.op.run = wait_op;
}

void decode_arrive(Decoder& d, uint16_t flags) {
    const bool expect = d.take("expect_tx");
    d.take("noComplete");
    const std::string order = d.take_any({"release", "relaxed"}, "");
    d.op.level = d.take_any({"cta", "cluster"}, "") == "cluster" ? kClusterLevel : kCtaLevel;
    d.op.space = take_barrier_space(d);
    d.take_any({"b64"});
    d.op.code = static_cast<uint16_t>(flags | (expect ? kExpectTx : 0) | (order == "relaxed" ? kRelaxed : 0));
    const bool has_state = d.operand(0).kind != Operand::kAddress;
    const size_t at = has_state ? 1 : 0;
    d.need_operands(at + 1, at + 2);
    if (has_state && d.operand(0).kind != Operand::kSink) {
        d.op.d = d.dest(d.operand(0), 8);
    }
    if (d.operand_count() == at + 2) {
        d.op.b = d.src(d.operand(at + 1), Type::kU32);
    } else if (expect) {
        d.fail("expect_tx needs a number of bytes");
    }
    bool wide = false;
    d.op.a = d.address(d.operand(at), &wide);
    d.op.target2 = wide;
    d.op.run = arrive;
}

void decode_transaction(Decoder& d, uint16_t flags) {
    d.take("relaxed");
    d.op.level = d.take_any({"cta", "cluster"}, "") == "cluster" ? kClusterLevel : kCtaLevel;
    d.op.space = take_barrier_space(d);
    d.take_any({"b64"}, "");
    d.op.code = static_cast<uint16_t>(flags | kRelaxed);
    d.need_operands(2, 2);
    d.op.b = d.src(d.operand(1), Type::kU32);
    bool wide = false;
    d.op.a = d.address(d.operand(0), &wide);
    d.op.target2 = wide;
    d.op.run = arrive;
}

void decode_object(Decoder& d, bool is_init) {
    d.op.space = take_barrier_space(d);
    d.take_any({"b64"});
    d.need_operands(is_init ? 2 : 1, is_init ? 2 : 1);
    if (is_init) {
        d.op.b = d.src(d.operand(1), Type::kU32);
    }
    bool wide = false;
    d.op.a = d.address(d.operand(0), &wide);
    d.op.target2 = wide;
    d.op.run = is_init ? init : inval;
}

void decode_mbarrier(Decoder& d) {
    d.op.op_class = OpClass::kMbarrier;
    d.op.dataflow = Dataflow::kRequire;
    const std::string kind = d.take_any({"init", "inval", "arrive", "arrive_drop", "test_wait", "try_wait",
                                         "complete_tx", "pending_count", "expect_tx"});
    if (kind == "init" || kind == "inval") {
        decode_object(d, kind == "init");
    } else if (kind == "arrive") {
        decode_arrive(d, kArrive);
    } else if (kind == "arrive_drop") {
        decode_arrive(d, kArrive | kDrop);
    } else if (kind == "expect_tx") {
        decode_transaction(d, kExpectTx);
    } else if (kind == "complete_tx") {
        decode_transaction(d, kCompleteTx);
    } else if (kind == "pending_count") {
        d.take_any({"b64"});
        d.need_operands(2, 2);
        d.op.d = d.dest(d.operand(0), 4);
        d.op.a = d.src(d.operand(1), Type::kB64);
        d.op.run = pending_count;
    } else {
        decode_wait(d, kind == "try_wait");
    }
}

}  // namespace

void register_mbarrier(DecodeTable& table) {
    table["mbarrier"] = decode_mbarrier;
}

}  // namespace sim
