// Arithmetic on f16, bf16 and their packed pairs.
#include <cmath>

#include "alu_families.h"
#include "float_formats.h"
#include "lanes.h"

namespace sim {
namespace {

enum Operation : uint16_t { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs };
enum Flags : uint16_t { kFlush = 1, kSaturate = 2, kRelu = 4, kNan = 8 };

double flushed(double x, const FloatFormat& format) {
    const double smallest = std::ldexp(1.0, 2 - (1 << (format.exponent_bits - 1)));
    return std::fabs(x) < smallest ? std::copysign(0.0, x) : x;
}

double choose(double a, double b, bool minimum, bool nan) {
    if (std::isnan(a) || std::isnan(b)) {
        return nan ? NAN : std::isnan(a) ? b : a;
    }
    if (a == b) {
        return std::signbit(a) == minimum ? a : b;
    }
    return (a < b) == minimum ? a : b;
}

// Products of two halves are exact in double; only the sum needs care.
double compute(uint16_t operation, double a, double b, double c, bool nan) {
    switch (operation) {
        case kAdd:
            return add_to_odd(a, b);
        case kSub:
            return add_to_odd(a, -b);
        case kMul:
            return a * b;
        case kFma:
            return add_to_odd(a * b, c);
        case kMin:
            return choose(a, b, true, nan);
        default:
            return choose(a, b, false, nan);
    }
}

uint32_t one(const Op& op, const FloatFormat& format, uint32_t a, uint32_t b, uint32_t c) {
    if (op.code == kNeg) {
        return (a ^ 0x8000u) & 0xffffu;
    }
    if (op.code == kAbs) {
        return a & 0x7fffu;
    }
    const bool flush = (op.code2 & kFlush) != 0;
    double x = decode_float(a & 0xffffu, format);
    double y = decode_float(b & 0xffffu, format);
    double z = decode_float(c & 0xffffu, format);
    if (flush) {
        x = flushed(x, format);
        y = flushed(y, format);
        z = flushed(z, format);
    }
    double r = compute(op.code, x, y, z, (op.code2 & kNan) != 0);
    if ((op.code2 & kSaturate) != 0) {
        r = std::isnan(r) ? 0.0 : std::fmin(std::fmax(r, 0.0), 1.0);
    }
    if ((op.code2 & kRelu) != 0 && !std::isnan(r)) {
        r = r > 0 ? r : 0.0;
    }
    uint32_t code = encode_float(r, format, Rounding::kNearestEven, false);
    if (flush && (code & 0x7fffu) < (1u << format.mantissa_bits)) {
        code &= 0x8000u;
    }
    return code;
}

template <class T>
Step half_op(Warp& w, const Op& op, uint32_t mask) {
    const FloatFormat& format = op.imm != 0 ? kFormatBf16 : kFormatF16;
    const T* a = source<T>(w, op.a);
    const T* b = op.b == kNone ? a : source<T>(w, op.b);
    const T* c = op.c == kNone ? a : source<T>(w, op.c);
    T result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        uint32_t value = one(op, format, a[i], b[i], c[i]);
        if (sizeof(T) == 4) {
            const auto high = [](T v) { return static_cast<uint32_t>(v) >> 16; };
            value |= one(op, format, high(a[i]), high(b[i]), high(c[i])) << 16;
        }
        result[i] = static_cast<T>(value);
    }
    merge(destination<T>(w, op.d), result, mask);
    return Step::kNext;
}

}  // namespace

void decode_half_arithmetic(Decoder& d, Type type) {
    static const std::unordered_map<std::string, Operation> operations = {
        {"add", kAdd}, {"sub", kSub}, {"mul", kMul}, {"fma", kFma},
        {"min", kMin}, {"max", kMax}, {"neg", kNeg}, {"abs", kAbs}};
    d.op.op_class = OpClass::kFloat;
    const auto found = operations.find(d.in().opcode);
    if (found == operations.end()) {
        d.fail("not supported for halves");
    }
    d.op.code = found->second;
    d.take("rn");
    d.op.code2 = static_cast<uint16_t>((d.take("ftz") ? kFlush : 0) | (d.take("sat") ? kSaturate : 0) |
                                       (d.take("relu") ? kRelu : 0) | (d.take("NaN") ? kNan : 0));
    d.op.imm = type == Type::kBf16 || type == Type::kBf16x2;
    const size_t sources = found->second == kFma ? 3 : found->second >= kNeg ? 1 : 2;
    d.need_operands(sources + 1, sources + 1);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    if (sources > 1) {
        d.op.b = d.src(d.operand(2), type);
    }
    if (sources > 2) {
        d.op.c = d.src(d.operand(3), type);
    }
    d.op.run = bytes_of(type) == 2 ? half_op<uint16_t> : half_op<uint32_t>;
}

}  // namespace sim
