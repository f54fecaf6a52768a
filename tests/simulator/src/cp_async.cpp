// cp.async: 4, 8 or 16 bytes a lane from global to shared memory, in the generic proxy.
#include <algorithm>

#include "address.h"
#include "async_copy.h"
#include "checker.h"
#include "decoder.h"
#include "global_shadow.h"
#include "lanes.h"
#include "launch.h"
#include "mbarrier.h"
#include "scheduler.h"

namespace sim {
namespace {

struct Copy {
    uint32_t offset;  // shared
    const uint8_t* source;
    uint32_t bytes, source_bytes;
};

class CpAsyncItem : public AsyncItem {
  public:
    bool perform(Cluster& cluster) override {
        for (const Copy& copy : copies) {
            uint8_t* to = cta->shared.data() + copy.offset;
            if (cluster.launch->config.check_races || cluster.launch->config.check_uninitialized) {
                check_write({&cluster, cta, copy.offset, copy.bytes, agent, operation->sequence, &order.clock,
                             nullptr, line});
            }
            if (copy.source_bytes != 0) {
                check_global(cluster, {agent, operation->sequence, access, false, &order},
                             reinterpret_cast<uint64_t>(copy.source), copy.source_bytes);
                std::memcpy(to, copy.source, copy.source_bytes);
            }
            std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
        }
        operation->done = true;
        return true;
    }
    std::string describe() const override { return "cp.async"; }

    std::vector<Copy> copies;
    std::shared_ptr<CpAsyncOp> operation;
    uint32_t agent = 0;
    uint16_t access = 0;
    Order order;
};

// cp.async.mbarrier.arrive: arrives when the lane's earlier copies are done.
class ArriveItem : public AsyncItem {
  public:
    bool perform(Cluster&) override {
        for (const auto& operation : waits_for) {
            if (!operation->done) {
                return false;
            }
        }
        arrive_for(*cta, offset, count, order, line);
        return true;
    }
    std::string describe() const override { return "cp.async.mbarrier.arrive"; }

    std::vector<std::shared_ptr<CpAsyncOp>> waits_for;
    uint32_t offset = 0, count = 1;
    Order order;
};

uint32_t source_bytes_of(const Warp& w, const Op& op, int lane) {
    const uint32_t bytes = op.code;
    if (op.p != kNone) {  // ignore-src
        return in_mask(predicate(w, op.p), lane) ? 0 : bytes;
    }
    if (op.c == kNone) {
        return bytes;
    }
    return std::min(bytes, source<uint32_t>(w, op.c)[lane]);
}

Step copy(Warp& w, const Op& op, uint32_t mask) {
    Cluster& cluster = *w.cta->cluster;
    auto item = std::make_unique<CpAsyncItem>();
    item->cta = w.cta;
    item->warp_index = w.index;
    item->line = op.line;
    item->issue_time = w.time;
    item->agent = agent_of(w, kCopies);
    item->access = op.access;
    item->operation = std::make_shared<CpAsyncOp>();
    item->operation->mask = mask;
    item->operation->sequence = ++w.cp_async_sequence;
    const uint32_t* lists = w.program->lists.data() + op.list;
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const uint64_t to =
            (op.target2 & 1) != 0 ? source<uint64_t>(w, lists[0])[i] : source<uint32_t>(w, lists[0])[i];
        const uint64_t from = source<uint64_t>(w, op.b)[i] + op.target;
        const uint32_t bytes = op.code;
        const uint32_t address = static_cast<uint32_t>(to + static_cast<uint64_t>(op.imm));
        if ((address & (bytes - 1)) != 0 || (from & (bytes - 1)) != 0) {
            throw SimError(ErrorKind::kMisaligned,
                           format("lane %d: cp.async of %u bytes from 0x%llx to shared 0x%x", i, bytes,
                                  static_cast<unsigned long long>(from), address),
                           op.line);
        }
        Copy c{};
        shared_target(w, address, bytes, false, op.line, &c.offset);
        c.bytes = bytes;
        c.source_bytes = source_bytes_of(w, op, i);
        c.source = c.source_bytes == 0 ? nullptr
                                       : resolve_global(cluster, from, c.source_bytes, op.line, "cp.async");
        item->copies.push_back(c);
        count_bytes(cluster, BytePath::kCpAsync, c.source_bytes);
    }
    if (cluster.launch->config.check_races) {
        fork(w, mask, item->order);
    }
    w.cp_async_open.push_back(item->operation);
    submit(cluster, std::move(item));
    return Step::kNext;
}

Step commit(Warp& w, const Op&, uint32_t mask) {
    CpAsyncGroup group;
    group.mask = mask;
    std::vector<std::shared_ptr<CpAsyncOp>> rest;
    for (auto& operation : w.cp_async_open) {
        ((operation->mask & mask) != 0 ? group.operations : rest).push_back(operation);
    }
    w.cp_async_open = std::move(rest);
    w.cp_async_groups.push_back(std::move(group));
    return Step::kNext;
}

Step wait(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t allowed = static_cast<uint32_t>(op.imm);
    if (!cp_async_done(w, mask, allowed)) {
        Wait& state = w.fragment().wait;
        state = Wait{};
        state.kind = WaitKind::kCpAsync;
        state.address = allowed;
        return Step::kBlocked;
    }
    w.fragment().wait = Wait{};
    uint32_t left = allowed;
    uint32_t newest = 0;
    for (size_t i = w.cp_async_groups.size(); i-- > 0;) {
        const CpAsyncGroup& group = w.cp_async_groups[i];
        if ((group.mask & mask) == 0) {
            continue;
        }
        if (allowed != kAllGroups && left != 0) {
            --left;
            continue;
        }
        for (const auto& operation : group.operations) {
            newest = std::max(newest, operation->sequence);
        }
    }
    if (allowed == kAllGroups) {
        newest = w.cp_async_sequence;
        w.cp_async_open.clear();
    }
    if (w.cta->cluster->launch->config.check_races && newest != 0) {
        set_clock(w.order.clock, agent_of(w, kCopies), newest);
    }
    if (allowed == 0 || allowed == kAllGroups) {
        w.cp_async_groups.clear();
    }
    return Step::kNext;
}

Step arrive(Warp& w, const Op& op, uint32_t mask) {
    Cluster& cluster = *w.cta->cluster;
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    std::vector<std::shared_ptr<CpAsyncOp>> earlier = w.cp_async_open;
    for (const CpAsyncGroup& group : w.cp_async_groups) {
        earlier.insert(earlier.end(), group.operations.begin(), group.operations.end());
    }
    Order order;
    if (cluster.launch->config.check_races) {
        fork(w, mask, order);
        set_clock(order.clock, agent_of(w, kCopies), w.cp_async_sequence);
    }
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        uint64_t address = addresses[i];
        if (op.space == Space::kGeneric) {
            address -= kSharedWindow;
        }
        auto item = std::make_unique<ArriveItem>();
        Cta& target = shared_target(w, static_cast<uint32_t>(address), 8, false, op.line, &item->offset);
        item->cta = &target;
        item->warp_index = w.index;
        item->line = op.line;
        item->issue_time = w.time;
        item->waits_for = earlier;
        item->order = order;
        if (op.code == 0) {
            expect_one_more(target, item->offset, op.line);
        }
        submit(cluster, std::move(item));
    }
    return Step::kNext;
}

void decode_copy(Decoder& d) {
    const bool bypass = d.take_any({"ca", "cg"}) == "cg";
    const Space to = d.take_space();
    const Space from = d.take_space();
    if (to != Space::kSharedCta || from != Space::kGlobal) {
        d.fail("cp.async copies from global to shared memory");
    }
    std::string rest;
    bool hinted = false;
    while (d.take_prefix("L2::", &rest)) {
        hinted = hinted || rest == "cache_hint";
    }
    d.need_operands(hinted ? 4 : 3, hinted ? 5 : 4);
    const uint64_t bytes = d.integer(d.operand(2));
    if ((bytes != 4 && bytes != 8 && bytes != 16) || (bypass && bytes != 16)) {
        d.fail("cp-size must be 4, 8 or 16 (16 with .cg)");
    }
    d.op.code = static_cast<uint16_t>(bytes);
    const size_t extra = d.operand_count() - 3 - (hinted ? 1 : 0);
    if (extra == 1) {
        const Operand& operand = d.operand(3);
        const bool ignore = operand.kind == Operand::kRegister && d.width_of(operand) == 0;
        if (ignore) {
            d.op.p = d.pred_src(operand);
        } else {
            d.op.c = d.src(operand, Type::kU32);
        }
    }
    bool wide = false;
    d.op.b = d.address(d.operand(1), &wide);
    if (!wide) {
        d.fail("a global address has 64 bits");
    }
    d.op.target = static_cast<uint32_t>(d.op.imm);
    const Ref destination_ref = d.address(d.operand(0), &wide);
    d.op.target2 = wide;
    d.op.list = d.list({destination_ref});
    d.op.list_size = 1;
    d.op.run = copy;
}

}  // namespace

void decode_bulk(Decoder& d);  // bulk_copy.cpp

namespace {

void decode_cp(Decoder& d) {
    d.op.op_class = OpClass::kAsyncCopy;
    d.op.dataflow = Dataflow::kRequire;
    const bool reduces = d.take("reduce");
    d.take_any({"async"});
    if (d.take("bulk")) {
        d.op.code2 = reduces;
        decode_bulk(d);
        return;
    }
    if (reduces) {
        d.fail("cp.reduce.async exists only with .bulk");
    }
    if (d.take("commit_group")) {
        d.op.run = commit;
    } else if (d.take("wait_group")) {
        d.op.imm = static_cast<int64_t>(d.integer(d.operand(0)));
        d.op.run = wait;
    } else if (d.take("wait_all")) {
        d.op.imm = kAllGroups;
        d.op.run = wait;
    } else if (d.take("mbarrier")) {
        d.take_any({"arrive"});
        d.op.code = d.take("noinc");
        d.op.space = d.take_space();
        d.take_any({"b64"});
        bool wide = false;
        d.op.a = d.address(d.operand(0), &wide);
        d.op.target2 = wide;
        d.op.run = arrive;
    } else {
        decode_copy(d);
    }
}

}  // namespace

bool cp_async_done(const Warp& w, uint32_t lanes, uint32_t allowed) {
    const auto all_done = [](const std::vector<std::shared_ptr<CpAsyncOp>>& operations) {
        return std::all_of(operations.begin(), operations.end(), [](const auto& o) { return o->done; });
    };
    if (allowed == kAllGroups && !all_done(w.cp_async_open)) {
        return false;
    }
    uint32_t left = allowed == kAllGroups ? 0 : allowed;
    for (size_t i = w.cp_async_groups.size(); i-- > 0;) {
        const CpAsyncGroup& group = w.cp_async_groups[i];
        if ((group.mask & lanes) == 0) {
            continue;
        }
        if (left != 0) {
            --left;
        } else if (!all_done(group.operations)) {
            return false;
        }
    }
    return true;
}

void register_cp_async(DecodeTable& table) {
    table["cp"] = decode_cp;
}

}  // namespace sim
