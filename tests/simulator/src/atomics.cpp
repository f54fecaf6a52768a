// atom and red.
#include <algorithm>
#include <cmath>
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

// -0 comes before +0.
bool precedes(double a, double b) {
    return a < b || (a == b && std::signbit(a) && !std::signbit(b));
}

double reduce_real(ReduceOp operation, double old, double b) {
    switch (operation) {
        case ReduceOp::kAdd:
            return add_to_odd(old, b);
        case ReduceOp::kMin:
            return precedes(b, old) || old != old ? b : old;
        case ReduceOp::kMax:
            return precedes(old, b) || old != old ? b : old;
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

uint32_t lanes_in_global(const Warp& w, const Op& op, uint32_t mask) {
    if (op.space != Space::kGeneric) {
        return op.space == Space::kGlobal ? mask : 0;
    }
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    uint32_t lanes = 0;
    for (int i = 0; i < kLanes; ++i) {
        lanes |= static_cast<uint32_t>(addresses[i] < kSharedWindow) << i;
    }
    return lanes & mask;
}

// Global memory adds f32 without subnormals, shared memory with them.
uint64_t add_flushed(uint64_t old, uint64_t b) {
    return as_bits(
        flush(flush(as_float(static_cast<uint32_t>(old))) + flush(as_float(static_cast<uint32_t>(b)))));
}

// code: Type; code2: ReduceOp; imm: offset; list: sources, then (atom) destinations.
Step atomic(Warp& w, const Op& op, uint32_t mask) {
    const Type type = static_cast<Type>(op.code);
    const ReduceOp operation = static_cast<ReduceOp>(op.code2);
    const uint32_t bytes = bytes_of(type);
    const uint32_t elements = op.target;
    uint8_t* pointers[kLanes];
    resolve_lanes(w, op, mask, bytes * elements, AccessKind::kAtomic, pointers);
    const uint32_t in_global = lanes_in_global(w, op, mask);
    if (elements > 1 && (mask & ~in_global) != 0) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("lanes 0x%08x: vectors are reduced in global memory only", mask & ~in_global),
                       op.line);
    }
    const std::lock_guard<std::mutex> lock(global_atomics());
    const uint32_t* lists = w.program->lists.data() + op.list;
    const bool returns = op.list_size > elements;
    const bool adds_f32 = type == Type::kF32 && operation == ReduceOp::kAdd;
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
            } else if (adds_f32 && in_mask(in_global, i)) {
                fresh = add_flushed(old, b);
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

std::vector<Operand> elements_of(const Decoder& d, size_t index, size_t count) {
    const Operand& operand = d.operand(index);
    const bool is_vector = operand.kind == Operand::kVector;
    if (is_vector != (count > 1) || (is_vector && operand.elements.size() != count)) {
        d.fail("the operand is no vector of the stated length");
    }
    return is_vector ? operand.elements : std::vector<Operand>{operand};
}

bool is_half(Type type) {
    return type == Type::kF16 || type == Type::kBf16 || type == Type::kF16x2 || type == Type::kBf16x2;
}

bool fits_scalar(ReduceOp operation, Type type) {
    const uint32_t bytes = bytes_of(type);
    const bool bits = type == Type::kB32 || type == Type::kB64;
    switch (operation) {
        case ReduceOp::kAdd:
            return type == Type::kU32 || type == Type::kS32 || type == Type::kU64 || type == Type::kF32 ||
                   type == Type::kF64 || is_half(type);
        case ReduceOp::kMin:
        case ReduceOp::kMax:
            return bytes >= 4 && (is_signed(type) || type == Type::kU32 || type == Type::kU64);
        case ReduceOp::kInc:
        case ReduceOp::kDec:
            return type == Type::kU32;
        case ReduceOp::kCompareAndSwap:
            return bits || type == Type::kB16;
        default:
            return bits;
    }
}

// Vectors: .f32 is added only, the halves are compared too; .v8 is for single halves.
bool fits_vector(ReduceOp operation, Type type, size_t elements) {
    if (type == Type::kF32) {
        return operation == ReduceOp::kAdd && elements <= 4;
    }
    const bool known =
        operation == ReduceOp::kAdd || operation == ReduceOp::kMin || operation == ReduceOp::kMax;
    return known && is_half(type) && bytes_of(type) * elements <= 16;
}

// The tables of the PTX ISA's atom and red.
void check_form(const Decoder& d, ReduceOp operation, Type type, size_t elements, bool noftz) {
    const bool fits = elements == 1 ? fits_scalar(operation, type) : fits_vector(operation, type, elements);
    if (!fits) {
        d.fail("the operation does not exist for this type");
    }
    if (noftz != is_half(type)) {
        d.fail(noftz ? ".noftz is for .f16, .bf16, .f16x2 and .bf16x2" : ".f16 and .bf16 need .noftz");
    }
    if (elements > 1 && d.op.space != Space::kGlobal && d.op.space != Space::kGeneric) {
        d.fail("vectors are reduced in global memory only");
    }
}

void decode_atomic(Decoder& d) {
    d.op.op_class = OpClass::kAtomic;
    d.op.dataflow = Dataflow::kRequire;
    const bool returns = d.in().opcode == "atom";
    take_memory_order(d, kGpuLevel);
    d.op.space = d.take_space();
    const ReduceOp operation = take_reduce_op(d);
    const bool noftz = d.take("noftz");
    const bool hinted = take_cache_hints(d);
    const std::string vector = d.take_any({"v2", "v4", "v8"}, "");
    const Type type = d.take_type();
    const size_t elements = vector.empty() ? 1 : static_cast<size_t>(vector[1] - '0');
    if (!returns && (operation == ReduceOp::kExchange || operation == ReduceOp::kCompareAndSwap)) {
        d.fail("red has no such operation");
    }
    check_form(d, operation, type, elements, noftz);
    const size_t address_at = returns ? 1 : 0;
    const bool swap = operation == ReduceOp::kCompareAndSwap;
    const size_t count = address_at + 2 + (swap ? 1 : 0) + (hinted ? 1 : 0);
    d.need_operands(count, count);
    std::vector<Ref> refs;
    for (const Operand& element : elements_of(d, address_at + 1, elements)) {
        refs.push_back(d.src(element, type));
    }
    d.op.target = static_cast<uint32_t>(refs.size());
    if (returns) {
        for (const Operand& element : elements_of(d, 0, elements)) {
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
