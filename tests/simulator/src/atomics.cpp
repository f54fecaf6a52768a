// atom and red.
#include <algorithm>
#include <mutex>

#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"
#include "launch.h"
#include "memory_decode.h"
#include "reduction.h"

namespace sim {

namespace {

template <class T>
T reduce_integer(ReduceOp operation, T old, T b) {
    switch (operation) {
        case ReduceOp::kAdd:
            return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(b));
        case ReduceOp::kMin:
            return std::min(old, b);
        case ReduceOp::kMax:
            return std::max(old, b);
        case ReduceOp::kInc:
            return static_cast<T>(old >= b ? 0 : old + 1);
        case ReduceOp::kDec:
            return static_cast<T>(old == 0 || old > b ? b : old - 1);
        case ReduceOp::kAnd:
            return static_cast<T>(old & b);
        case ReduceOp::kOr:
            return static_cast<T>(old | b);
        case ReduceOp::kXor:
            return static_cast<T>(old ^ b);
        default:
            return b;
    }
}

double reduce_real(ReduceOp operation, double old, double b) {
    switch (operation) {
        case ReduceOp::kAdd:
            return add_to_odd(old, b);
        case ReduceOp::kMin:
            return b < old || old != old ? b : old;
        case ReduceOp::kMax:
            return b > old || old != old ? b : old;
        default:
            return b;
    }
}

uint32_t reduce_half(ReduceOp operation, uint32_t old, uint32_t b, const FloatFormat& format) {
    const double value =
        reduce_real(operation, decode_float(old & 0xffff, format), decode_float(b & 0xffff, format));
    return encode_float(value, format, Rounding::kNearestEven, false);
}

}  // namespace

uint64_t reduce_value(ReduceOp operation, Type type, uint64_t old, uint64_t b) {
    if (operation == ReduceOp::kExchange) {
        return b;
    }
    switch (type) {
        case Type::kS32:
            return static_cast<uint32_t>(
                reduce_integer(operation, static_cast<int32_t>(old), static_cast<int32_t>(b)));
        case Type::kS64:
            return static_cast<uint64_t>(
                reduce_integer(operation, static_cast<int64_t>(old), static_cast<int64_t>(b)));
        case Type::kF32: {
            const float x = as_float(static_cast<uint32_t>(old));
            const float y = as_float(static_cast<uint32_t>(b));
            return as_bits(operation == ReduceOp::kAdd ? x + y
                                                       : static_cast<float>(reduce_real(operation, x, y)));
        }
        case Type::kF64: {
            const double x = as_double(old);
            const double y = as_double(b);
            return as_bits(operation == ReduceOp::kAdd ? x + y : reduce_real(operation, x, y));
        }
        case Type::kF16:
        case Type::kBf16:
        case Type::kF16x2:
        case Type::kBf16x2: {
            const bool bf16 = type == Type::kBf16 || type == Type::kBf16x2;
            const FloatFormat& format = bf16 ? kFormatBf16 : kFormatF16;
            const uint32_t low =
                reduce_half(operation, static_cast<uint32_t>(old), static_cast<uint32_t>(b), format);
            if (bytes_of(type) == 2) {
                return low;
            }
            return low | reduce_half(operation, static_cast<uint32_t>(old >> 16),
                                     static_cast<uint32_t>(b >> 16), format)
                             << 16;
        }
        default:
            return bytes_of(type) == 8 ? reduce_integer<uint64_t>(operation, old, b)
                                       : reduce_integer<uint32_t>(operation, static_cast<uint32_t>(old),
                                                                  static_cast<uint32_t>(b));
    }
}

std::mutex& global_atomics() {
    static std::mutex mutex;
    return mutex;
}

namespace {

// code: Type; code2: ReduceOp; imm: offset; list: sources, then (atom) destinations.
Step atomic(Warp& w, const Op& op, uint32_t mask) {
    const Type type = static_cast<Type>(op.code);
    const ReduceOp operation = static_cast<ReduceOp>(op.code2);
    const uint32_t bytes = bytes_of(type);
    const uint32_t elements = op.target;
    uint8_t* pointers[kLanes];
    resolve_lanes(w, op, mask, bytes * elements, AccessKind::kAtomic, pointers);
    const std::lock_guard<std::mutex> lock(global_atomics());
    const uint32_t* lists = w.program->lists.data() + op.list;
    const bool returns = op.list_size > elements;
    bool changed = false;
    for (int i = 0; i < kLanes; ++i) {
        for (uint32_t e = 0; in_mask(mask, i) && e < elements; ++e) {
            uint64_t old = 0, b = 0, c = 0;
            std::memcpy(&old, pointers[i] + e * bytes, bytes);
            std::memcpy(&b, source<uint8_t>(w, lists[e]) + static_cast<uint32_t>(i) * bytes, bytes);
            uint64_t fresh;
            if (operation == ReduceOp::kCompareAndSwap) {
                std::memcpy(&c, source<uint8_t>(w, op.c) + static_cast<uint32_t>(i) * bytes, bytes);
                fresh = old == b ? c : old;
            } else {
                fresh = reduce_value(operation, type, old, b);
            }
            changed = changed || std::memcmp(pointers[i] + e * bytes, &fresh, bytes) != 0;
            std::memcpy(pointers[i] + e * bytes, &fresh, bytes);
            if (returns) {
                std::memcpy(destination<uint8_t>(w, lists[elements + e]) + static_cast<uint32_t>(i) * bytes,
                            &old, bytes);
            }
        }
    }
    count_bytes(*w.cta->cluster, BytePath::kAtomic,
                uint64_t{bytes} * elements * static_cast<uint64_t>(__builtin_popcount(mask)));
    w.cta->cluster->progress += changed;  // one that changes nothing is polling
    return Step::kNext;
}

std::vector<Operand> elements_of(const Operand& operand) {
    return operand.kind == Operand::kVector ? operand.elements : std::vector<Operand>{operand};
}

void decode_atomic(Decoder& d) {
    d.op.op_class = OpClass::kAtomic;
    d.op.dataflow = Dataflow::kRequire;
    const bool returns = d.in().opcode == "atom";
    take_memory_order(d, kGpuLevel);
    d.op.space = d.take_space();
    const ReduceOp operation = take_reduce_op(d);
    d.take("noftz");
    const bool hinted = take_cache_hints(d);
    d.take_any({"v2", "v4", "v8"}, "");
    const Type type = d.take_type();
    const size_t address_at = returns ? 1 : 0;
    const bool swap = operation == ReduceOp::kCompareAndSwap;
    const size_t count = address_at + 2 + (swap ? 1 : 0) + (hinted ? 1 : 0);
    d.need_operands(count, count);
    std::vector<Ref> refs;
    for (const Operand& element : elements_of(d.operand(address_at + 1))) {
        refs.push_back(d.src(element, type));
    }
    d.op.target = static_cast<uint32_t>(refs.size());
    if (returns) {
        for (const Operand& element : elements_of(d.operand(0))) {
            refs.push_back(d.dest(element, bytes_of(type)));
        }
    }
    d.op.list = d.list(refs);
    d.op.list_size = static_cast<uint16_t>(refs.size());
    if (swap) {
        d.op.c = d.src(d.operand(address_at + 2), type);
    }
    bool wide = false;
    d.op.a = d.address(d.operand(address_at), &wide);
    d.op.target2 = wide;
    d.op.code = static_cast<uint16_t>(type);
    d.op.code2 = static_cast<uint16_t>(operation);
    d.op.run = atomic;
}

}  // namespace

ReduceOp take_reduce_op(Decoder& d) {
    static const std::pair<const char*, ReduceOp> operations[] = {
        {"add", ReduceOp::kAdd},       {"min", ReduceOp::kMin},
        {"max", ReduceOp::kMax},       {"inc", ReduceOp::kInc},
        {"dec", ReduceOp::kDec},       {"and", ReduceOp::kAnd},
        {"or", ReduceOp::kOr},         {"xor", ReduceOp::kXor},
        {"exch", ReduceOp::kExchange}, {"cas", ReduceOp::kCompareAndSwap}};
    for (const auto& [name, operation] : operations) {
        if (d.take(name)) {
            return operation;
        }
    }
    d.fail("the operation is missing");
}

void register_atomics(DecodeTable& table) {
    table["atom"] = decode_atomic;
    table["red"] = decode_atomic;
}

}  // namespace sim
