// st.async and red.async: writes to the shared memory of another CTA that announce themselves on an mbarrier
// beside them. They are made in the generic proxy, but at a time of their own.
#include <algorithm>
#include <cstring>

#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "launch.h"
#include "mbarrier.h"
#include "reduction.h"
#include "scheduler.h"

namespace sim {
namespace {

constexpr uint32_t kMostBytes = 16;

// What the instruction's list holds behind its source registers: the mbarrier's address.
enum BarrierPlace : uint32_t { kBarrierRegister, kBarrierOffset, kBarrierIsWide, kBarrierPlaces };

// One lane's write.
class AsyncStore : public AsyncItem {
  public:
    bool perform(Cluster& cluster) override;
    std::string describe() const override {
        return reduces ? "a reduction in shared memory" : "a store to shared memory";
    }

    Cta* target = nullptr;
    uint32_t offset = 0, barrier = 0, bytes = 0;  // offsets from kSharedBase
    uint64_t phase = 0;                           // of the barrier at the issue
    bool reduces = false;
    ReduceOp operation = ReduceOp::kAdd;
    Type type = Type::kB32;
    uint8_t data[kMostBytes] = {};
    std::shared_ptr<const Order> order;  // one for the lanes of an instruction
};

bool AsyncStore::perform(Cluster& cluster) {
    if (target->warps_alive == 0) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("%s reaches CTA rank %u, which has exited", describe().c_str(), target->rank),
                       line);
    }
    const Config& config = cluster.launch->config;
    if (config.check_races || config.check_uninitialized) {
        const Access access{&cluster,
                            target,
                            offset,
                            bytes,
                            mbarrier_at(*target, barrier, line).store_agent,
                            static_cast<uint32_t>(phase) + 1,
                            &order->clock,
                            nullptr,
                            line,
                            0,
                            reduces ? kClusterLevel : kWeak};
        if (reduces) {
            check_read(access);
        }
        check_write(access);
    }
    uint8_t* to = target->shared.data() + offset;
    if (reduces) {
        uint64_t old = 0, value = 0;
        std::memcpy(&old, to, bytes);
        std::memcpy(&value, data, bytes);
        const uint64_t fresh = reduce_value(operation, type, old, value);
        std::memcpy(to, &fresh, bytes);
    } else {
        std::memcpy(to, data, bytes);
    }
    complete_transfer(*target, barrier, bytes, phase, *order, line);
    return true;
}

// The part of a shared::cluster address that names the CTA and the place in it.
uint32_t in_window(const Op& op, uint64_t address, uint32_t alignment, int lane, const char* what) {
    if (address % alignment != 0) {
        throw SimError(ErrorKind::kMisaligned,
                       format("lane %d: %s 0x%llx is not aligned to %u bytes", lane, what,
                              static_cast<unsigned long long>(address), alignment),
                       op.line);
    }
    if (op.space != Space::kGeneric) {
        return static_cast<uint32_t>(address);
    }
    if (address < kSharedWindow || address >= kLocalWindow) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("lane %d: %s 0x%llx is not in shared memory", lane, what,
                              static_cast<unsigned long long>(address)),
                       op.line);
    }
    return static_cast<uint32_t>(address - kSharedWindow);
}

uint64_t barrier_address(const Warp& w, const uint32_t* places, int lane) {
    const Ref from = places[kBarrierRegister];
    const uint64_t base =
        places[kBarrierIsWide] != 0 ? source<uint64_t>(w, from)[lane] : source<uint32_t>(w, from)[lane];
    return base + static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(places[kBarrierOffset])));
}

void aim(Warp& w, const Op& op, uint64_t to, uint64_t announce, int lane, AsyncStore& item) {
    const uint32_t address = in_window(op, to, item.bytes, lane, "the destination");
    item.target = &shared_target(w, address, item.bytes, true, op.line, &item.offset);
    const uint32_t at = in_window(op, announce, 8, lane, "the mbarrier");
    const Cta& announced = shared_target(w, at, 8, true, op.line, &item.barrier);
    if (&announced != item.target) {
        throw SimError(ErrorKind::kBarrier,
                       format("lane %d: the mbarrier 0x%x is in another CTA than the destination 0x%x", lane,
                              at, address),
                       op.line);
    }
    if (item.target == w.cta) {
        throw SimError(ErrorKind::kInvalidValue,
                       format("lane %d: the destination 0x%x is in the executing CTA: it must be in another "
                              "one of the cluster",
                              lane, address),
                       op.line);
    }
    Mbarrier& barrier = mbarrier_at(*item.target, item.barrier, op.line);
    if (w.cta->cluster->launch->config.check_races) {
        check_init(w, *item.target, item.barrier, barrier, false, op.line);
    }
    if (barrier.store_agent == kNone) {
        barrier.store_agent = new_agent(*w.cta->cluster, AgentKind::kAsyncStore, item.target->rank, at);
    }
    item.phase = barrier.phase;
}

// code: Type; code2: ReduceOp; target: 1 for red.async; list: sources, then BarrierPlace.
Step issue(Warp& w, const Op& op, uint32_t mask) {
    Cluster& cluster = *w.cta->cluster;
    const Type type = static_cast<Type>(op.code);
    const uint32_t element = bytes_of(type);
    const uint32_t count = op.list_size - kBarrierPlaces;
    const uint32_t* lists = w.program->lists.data() + op.list;
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    auto order = std::make_shared<Order>();
    std::vector<std::unique_ptr<AsyncStore>> items;
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        auto item = std::make_unique<AsyncStore>();
        item->cta = w.cta;
        item->warp_index = w.index;
        item->line = op.line;
        item->issue_time = w.time;
        item->bytes = element * count;
        item->reduces = op.target != 0;
        item->operation = static_cast<ReduceOp>(op.code2);
        item->type = type;
        item->order = order;
        for (uint32_t e = 0; e < count; ++e) {
            std::memcpy(item->data + e * element,
                        source<uint8_t>(w, lists[e]) + static_cast<uint32_t>(i) * element, element);
        }
        aim(w, op, addresses[i], barrier_address(w, lists + count, i), i, *item);
        items.push_back(std::move(item));
    }
    if (cluster.launch->config.check_races) {
        fork(w, mask, *order);
    }
    count_bytes(cluster, op.target != 0 ? BytePath::kAtomic : BytePath::kSharedStore,
                uint64_t{element} * count * items.size());
    for (auto& item : items) {
        submit(cluster, std::move(item));
    }
    return Step::kNext;
}

Type take_store_type(Decoder& d, size_t elements) {
    const Type type = d.take_type();
    const uint32_t bytes = bytes_of(type);
    const bool plain = type != Type::kTf32 && type != Type::kF16x2 && type != Type::kBf16x2;
    if (!plain || (bytes != 4 && bytes != 8)) {
        d.fail("st.async stores .b32, .u32, .s32, .f32, .b64, .u64, .s64 or .f64");
    }
    if (bytes * elements > kMostBytes) {
        d.fail("the vector exceeds 128 bits");
    }
    return type;
}

Type take_reduced_type(Decoder& d, ReduceOp operation) {
    const Type type = d.take_type();
    bool fits = false;
    switch (operation) {
        case ReduceOp::kInc:
        case ReduceOp::kDec:
            fits = type == Type::kU32;
            break;
        case ReduceOp::kMin:
        case ReduceOp::kMax:
            fits = type == Type::kU32 || type == Type::kS32;
            break;
        case ReduceOp::kAnd:
        case ReduceOp::kOr:
        case ReduceOp::kXor:
            fits = type == Type::kB32;
            break;
        case ReduceOp::kAdd:
            fits = type == Type::kU32 || type == Type::kS32 || type == Type::kU64;
            break;
        default:
            break;
    }
    if (!fits) {
        d.fail(
            "red.async takes .inc, .dec on .u32, .min, .max on .u32, .s32, .and, .or, .xor on .b32 and .add "
            "on .u32, .s32, .u64");
    }
    return type;
}

void take_async_form(Decoder& d, bool reduces) {
    d.take_any({"async"});
    if (d.take("release") || d.take("mmio")) {
        d.fail("the release form on global memory needs sm_100; the device is sm_90a");
    }
    if (reduces) {
        d.take_any({"relaxed"});
        d.take_any({"cluster"});
    } else {
        d.take("weak");
    }
    d.op.space = d.take_space();
    if (d.op.space != Space::kGeneric && d.op.space != Space::kSharedCluster) {
        d.fail("the destination is in .shared::cluster");
    }
    d.take_any({"mbarrier::complete_tx::bytes"});
}

void decode_async(Decoder& d) {
    const bool reduces = d.in().opcode == "red";
    d.op.op_class = reduces ? OpClass::kAtomic : OpClass::kAsyncCopy;
    d.op.dataflow = Dataflow::kRequire;
    take_async_form(d, reduces);
    ReduceOp operation = ReduceOp::kAdd;
    size_t elements = 1;
    if (reduces) {
        operation = take_reduce_op(d);
    } else {
        const std::string vector = d.take_any({"v2", "v4"}, "");
        elements = vector.empty() ? 1 : static_cast<size_t>(vector[1] - '0');
    }
    const Type type = reduces ? take_reduced_type(d, operation) : take_store_type(d, elements);
    d.need_operands(3, 3);
    const Operand& value = d.operand(1);
    const std::vector<Operand> values =
        value.kind == Operand::kVector ? value.elements : std::vector<Operand>{value};
    if (values.size() != elements || (value.kind == Operand::kVector) != (elements > 1)) {
        d.fail("the operand is no vector of the stated length");
    }
    std::vector<Ref> refs;
    for (const Operand& one : values) {
        refs.push_back(d.src(one, type));
    }
    bool wide = false;
    refs.push_back(d.address(d.operand(2), &wide));
    refs.push_back(static_cast<uint32_t>(static_cast<int32_t>(d.op.imm)));
    refs.push_back(wide);
    d.op.list = d.list(refs);
    d.op.list_size = static_cast<uint16_t>(refs.size());
    d.op.a = d.address(d.operand(0), &wide);
    d.op.target2 = wide;
    d.op.code = static_cast<uint16_t>(type);
    d.op.code2 = static_cast<uint16_t>(operation);
    d.op.target = reduces;
    d.op.run = issue;
}

}  // namespace

void register_async_store(DecodeTable& table) {
    table["st.async"] = decode_async;
    table["red.async"] = decode_async;
}

}  // namespace sim
