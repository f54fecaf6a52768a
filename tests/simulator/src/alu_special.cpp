// Special functions. The hardware's .approx results differ in their last bits; these are rounded
// from a more accurate value, so a test's tolerance must cover the ISA's stated error.
#include <cmath>

#include "alu_families.h"
#include "float_formats.h"
#include "lanes.h"

namespace sim {
namespace {

// 2^x for lanes: 2^integer * polynomial on [-0.5, 0.5]; error below 1.5 units in the last place.
inline float exp2_flushed(float input) {
    const float x = flush(input);
    const float clamped = x > 129.0f ? 129.0f : x < -127.0f ? -127.0f : x;
    const float rounded = __builtin_rintf(clamped);
    const float f = clamped - rounded;
    float p = 1.5403530e-4f;
    p = __builtin_fmaf(p, f, 1.3333558e-3f);
    p = __builtin_fmaf(p, f, 9.6181291e-3f);
    p = __builtin_fmaf(p, f, 5.5504109e-2f);
    p = __builtin_fmaf(p, f, 2.4022651e-1f);
    p = __builtin_fmaf(p, f, 6.9314718e-1f);
    p = __builtin_fmaf(p, f, 1.0f);
    const int32_t half = static_cast<int32_t>(rounded) >> 1;
    const int32_t rest = static_cast<int32_t>(rounded) - half;
    const float scale1 = as_float(static_cast<uint32_t>(half + 127) << 23);
    const float scale2 = as_float(static_cast<uint32_t>(rest + 127) << 23);
    float r = flush(p * scale1 * scale2);
    r = x >= 128.0f ? as_float(0x7f800000u) : r;
    r = x < -126.0f ? 0.0f : r;
    return x != x ? as_float(kCanonicalNan) : r;
}

Step ex2_ftz(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(w, op, mask, [](float x) { return exp2_flushed(x); });
}
Step ex2_full(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(w, op, mask, [](float x) { return canonical(std::exp2(x)); });
}

using Unary = double (*)(double);
double rcp_of(double x) {
    return 1.0 / x;
}
double rsqrt_of(double x) {
    return 1.0 / std::sqrt(x);
}
double exp2_of(double x) {
    return std::exp2(x);
}
double log2_of(double x) {
    return std::log2(x);
}
double sqrt_of(double x) {
    return std::sqrt(x);
}
double sin_of(double x) {
    return std::sin(x);
}
double cos_of(double x) {
    return std::cos(x);
}
double tanh_of(double x) {
    return std::tanh(x);
}

template <Unary kFunction, bool kFlush>
Step f32_unary(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(w, op, mask, [](float a) {
        const float x = kFlush ? flush(a) : a;
        const float r = static_cast<float>(kFunction(x));
        return canonical(kFlush ? flush(r) : r);
    });
}
template <Unary kFunction>
Step f64_unary(Warp& w, const Op& op, uint32_t mask) {
    return map1<double, double>(w, op, mask, [](double a) { return kFunction(a); });
}
template <Unary kFunction>
Handler f32_handler(bool ftz) {
    return ftz ? f32_unary<kFunction, true> : f32_unary<kFunction, false>;
}

template <bool kFlush>
Step rcp_f32(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(w, op, mask,
                              [](float a) { return canonical(kFlush ? flush(1.0f / flush(a)) : 1.0f / a); });
}
template <bool kFlush>
Step sqrt_f32(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(
        w, op, mask, [](float a) { return canonical(kFlush ? flush(std::sqrt(flush(a))) : std::sqrt(a)); });
}

// ex2 and tanh of halves, one or two to a register.
template <Unary kFunction>
Step half_unary(Warp& w, const Op& op, uint32_t mask) {
    const Type type = static_cast<Type>(op.code);
    const bool bf16 = type == Type::kBf16 || type == Type::kBf16x2;
    const FloatFormat& format = bf16 ? kFormatBf16 : kFormatF16;
    const auto one = [&](uint32_t code) {
        return encode_float(kFunction(decode_float(code & 0xffff, format)), format, Rounding::kNearestEven,
                            false);
    };
    if (bytes_of(type) == 2) {
        return map1<uint16_t, uint16_t>(w, op, mask,
                                        [&](uint16_t a) { return static_cast<uint16_t>(one(a)); });
    }
    return map1<uint32_t, uint32_t>(w, op, mask, [&](uint32_t a) { return one(a) | one(a >> 16) << 16; });
}

void decode_special(Decoder& d) {
    d.op.op_class = OpClass::kSpecialFunction;
    const std::string& opcode = d.in().opcode;
    const std::string mode = d.take_any({"approx", "rn", "rz", "rm", "rp"}, "rn");
    const bool ftz = d.take("ftz");
    const Type type = d.take_type();
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.code = static_cast<uint16_t>(type);
    if (mode == "rz" || mode == "rm" || mode == "rp") {
        decode_directed(d, type,
                        mode == "rz"   ? Rounding::kZero
                        : mode == "rm" ? Rounding::kDown
                                       : Rounding::kUp,
                        ftz, false);
        return;
    }
    if (type == Type::kF64) {
        d.op.run = opcode == "rcp"     ? f64_unary<rcp_of>
                   : opcode == "sqrt"  ? f64_unary<sqrt_of>
                   : opcode == "rsqrt" ? f64_unary<rsqrt_of>
                                       : nullptr;
        return;
    }
    if (type != Type::kF32) {
        d.op.run = opcode == "ex2" ? half_unary<exp2_of> : opcode == "tanh" ? half_unary<tanh_of> : nullptr;
        return;
    }
    if (opcode == "ex2") {
        d.op.run = ftz ? ex2_ftz : ex2_full;
    } else if (opcode == "rcp") {
        d.op.run = ftz ? rcp_f32<true> : rcp_f32<false>;
    } else if (opcode == "sqrt") {
        d.op.run = ftz ? sqrt_f32<true> : sqrt_f32<false>;
    } else if (opcode == "rsqrt") {
        d.op.run = f32_handler<rsqrt_of>(ftz);
    } else if (opcode == "lg2") {
        d.op.run = f32_handler<log2_of>(ftz);
    } else if (opcode == "sin") {
        d.op.run = f32_handler<sin_of>(ftz);
    } else if (opcode == "cos") {
        d.op.run = f32_handler<cos_of>(ftz);
    } else {
        d.op.run = f32_handler<tanh_of>(ftz);
    }
}

}  // namespace

void register_special_functions(DecodeTable& table) {
    for (const char* name : {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}) {
        table[name] = decode_special;
    }
}

}  // namespace sim
