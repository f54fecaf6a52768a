// f32 and f64 arithmetic, and the choice between integer, float and half for shared mnemonics.
#include <cmath>

#include "alu_families.h"
#include "decoder.h"
#include "lanes.h"

namespace sim {
namespace {

struct FAdd {
    template <class T>
    T operator()(T a, T b) const {
        return a + b;
    }
};
struct FSub {
    template <class T>
    T operator()(T a, T b) const {
        return a - b;
    }
};
struct FMul {
    template <class T>
    T operator()(T a, T b) const {
        return a * b;
    }
};
struct FDiv {
    template <class T>
    T operator()(T a, T b) const {
        return a / b;
    }
};

float saturated(float v) {
    return v > 1.0f ? 1.0f : v > 0.0f ? v : 0.0f;
}  // NaN becomes 0

template <class F, bool kFlush, bool kSaturate>
Step f32_binary(Warp& w, const Op& op, uint32_t mask) {
    return map2<float, float, float>(w, op, mask, [](float a, float b) {
        float r = kFlush ? flush(F{}(flush(a), flush(b))) : F{}(a, b);
        return kSaturate ? saturated(r) : canonical(r);
    });
}

template <class F>
Handler f32_binary_handler(bool ftz, bool sat) {
    return ftz ? (sat ? f32_binary<F, true, true> : f32_binary<F, true, false>)
               : (sat ? f32_binary<F, false, true> : f32_binary<F, false, false>);
}

template <class F>
Step f64_binary(Warp& w, const Op& op, uint32_t mask) {
    return map2<double, double, double>(w, op, mask, F{});
}

template <bool kFlush, bool kSaturate>
Step f32_fma(Warp& w, const Op& op, uint32_t mask) {
    return map3<float, float, float, float>(w, op, mask, [](float a, float b, float c) {
        const float r =
            kFlush ? flush(__builtin_fmaf(flush(a), flush(b), flush(c))) : __builtin_fmaf(a, b, c);
        return kSaturate ? saturated(r) : canonical(r);
    });
}
Step f64_fma(Warp& w, const Op& op, uint32_t mask) {
    return map3<double, double, double, double>(
        w, op, mask, [](double a, double b, double c) { return __builtin_fma(a, b, c); });
}

template <class T, bool kMin>
T min_max(T a, T b) {
    if (a != a) {
        return b;
    }
    if (b != b) {
        return a;
    }
    if (a == b) {  // zeros of both signs
        return std::signbit(a) == kMin ? a : b;
    }
    return (a < b) == kMin ? a : b;
}

template <bool kMin, bool kFlush, bool kNan>
Step f32_min_max(Warp& w, const Op& op, uint32_t mask) {
    return map2<float, float, float>(w, op, mask, [](float a, float b) {
        const float x = kFlush ? flush(a) : a;
        const float y = kFlush ? flush(b) : b;
        const uint32_t both = kMin ? (as_bits(x) | as_bits(y)) : (as_bits(x) & as_bits(y));
        float r = (kMin ? x < y : x > y) ? x : y;
        r = x == y ? as_float(both) : r;
        r = x != x ? y : r;
        r = y != y ? x : r;
        if (kNan) {
            r = (x != x || y != y) ? as_float(kCanonicalNan) : r;
        }
        return canonical(r);
    });
}
template <bool kMin>
Handler f32_min_max_handler(bool ftz, bool nan) {
    return ftz ? (nan ? f32_min_max<kMin, true, true> : f32_min_max<kMin, true, false>)
               : (nan ? f32_min_max<kMin, false, true> : f32_min_max<kMin, false, false>);
}
template <bool kMin>
Step f64_min_max(Warp& w, const Op& op, uint32_t mask) {
    return map2<double, double, double>(w, op, mask, min_max<double, kMin>);
}

template <bool kFlush, bool kNeg>
Step f32_neg_abs(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, float>(w, op, mask, [](float a) {
        const float x = kFlush ? flush(a) : a;
        return as_float(kNeg ? as_bits(x) ^ 0x80000000u : as_bits(x) & 0x7fffffffu);
    });
}
template <bool kNeg>
Step f64_neg_abs(Warp& w, const Op& op, uint32_t mask) {
    return map1<double, double>(w, op, mask, [](double a) { return kNeg ? -a : std::fabs(a); });
}

Step copysign_f32(Warp& w, const Op& op, uint32_t mask) {  // sign of a, magnitude of b
    return map2<float, float, float>(w, op, mask, [](float a, float b) { return std::copysign(b, a); });
}
Step copysign_f64(Warp& w, const Op& op, uint32_t mask) {
    return map2<double, double, double>(w, op, mask, [](double a, double b) { return std::copysign(b, a); });
}

bool is_half(Type type) {
    return type == Type::kF16 || type == Type::kBf16 || type == Type::kF16x2 || type == Type::kBf16x2;
}

Rounding take_rounding(Decoder& d) {
    const std::string mode = d.take_any({"rn", "rz", "rm", "rp"}, "rn");
    return mode == "rn"   ? Rounding::kNearestEven
           : mode == "rz" ? Rounding::kZero
           : mode == "rm" ? Rounding::kDown
                          : Rounding::kUp;
}

void operands(Decoder& d, Type type, size_t sources) {
    d.need_operands(sources + 1, sources + 1);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    if (sources > 1) {
        d.op.b = d.src(d.operand(2), type);
    }
    if (sources > 2) {
        d.op.c = d.src(d.operand(3), type);
    }
}

void decode_float_binary(Decoder& d, Type type) {
    d.op.op_class = OpClass::kFloat;
    const std::string& opcode = d.in().opcode;
    const Rounding rounding = take_rounding(d);
    const bool ftz = d.take("ftz");
    const bool sat = d.take("sat");
    operands(d, type, 2);
    if (rounding != Rounding::kNearestEven) {
        decode_directed(d, type, rounding, ftz, sat);
        return;
    }
    const bool f32 = type == Type::kF32;
    if (opcode == "add") {
        d.op.run = f32 ? f32_binary_handler<FAdd>(ftz, sat) : f64_binary<FAdd>;
    } else if (opcode == "sub") {
        d.op.run = f32 ? f32_binary_handler<FSub>(ftz, sat) : f64_binary<FSub>;
    } else {
        d.op.run = f32 ? f32_binary_handler<FMul>(ftz, sat) : f64_binary<FMul>;
    }
}

void decode_add_sub(Decoder& d) {
    if (decode_add_with_carry(d)) {
        return;
    }
    const Type type = d.take_type();
    if (is_half(type)) {
        decode_half_arithmetic(d, type);
    } else if (type == Type::kF32 || type == Type::kF64) {
        decode_float_binary(d, type);
    } else {
        decode_integer_add(d, type);
    }
}

void decode_carry_chain(Decoder& d) {
    if (!decode_add_with_carry(d)) {
        d.fail("this form is not supported");
    }
}

void decode_fma_float(Decoder& d, Type type) {
    d.op.op_class = OpClass::kFloat;
    const Rounding rounding = take_rounding(d);
    const bool ftz = d.take("ftz");
    const bool sat = d.take("sat");
    operands(d, type, 3);
    if (rounding != Rounding::kNearestEven) {
        decode_directed(d, type, rounding, ftz, sat);
    } else if (type == Type::kF64) {
        d.op.run = f64_fma;
    } else {
        d.op.run = ftz ? (sat ? f32_fma<true, true> : f32_fma<true, false>)
                       : (sat ? f32_fma<false, true> : f32_fma<false, false>);
    }
}

void decode_mul_mad(Decoder& d) {
    const Type type = d.take_type();
    const bool mad = d.in().opcode == "mad";
    if (is_half(type)) {
        decode_half_arithmetic(d, type);
    } else if (type == Type::kF32 || type == Type::kF64) {
        mad ? decode_fma_float(d, type) : decode_float_binary(d, type);
    } else {
        decode_integer_mul(d, type);
    }
}

void decode_fma(Decoder& d) {
    const Type type = d.take_type();
    if (is_half(type)) {
        decode_half_arithmetic(d, type);
    } else {
        decode_fma_float(d, type);
    }
}

void decode_min_max(Decoder& d) {
    const Type type = d.take_type();
    const bool minimum = d.in().opcode == "min";
    if (is_half(type)) {
        decode_half_arithmetic(d, type);
        return;
    }
    if (type != Type::kF32 && type != Type::kF64) {
        decode_integer_min_max(d, type);
        return;
    }
    d.op.op_class = OpClass::kFloat;
    const bool ftz = d.take("ftz");
    const bool nan = d.take("NaN");
    operands(d, type, 2);
    if (type == Type::kF64) {
        d.op.run = minimum ? f64_min_max<true> : f64_min_max<false>;
    } else {
        d.op.run = minimum ? f32_min_max_handler<true>(ftz, nan) : f32_min_max_handler<false>(ftz, nan);
    }
}

void decode_neg_abs(Decoder& d) {
    const Type type = d.take_type();
    const bool neg = d.in().opcode == "neg";
    if (is_half(type)) {
        decode_half_arithmetic(d, type);
        return;
    }
    if (type != Type::kF32 && type != Type::kF64) {
        decode_integer_neg_abs(d, type);
        return;
    }
    d.op.op_class = OpClass::kFloat;
    const bool ftz = d.take("ftz");
    operands(d, type, 1);
    if (type == Type::kF64) {
        d.op.run = neg ? f64_neg_abs<true> : f64_neg_abs<false>;
    } else {
        d.op.run = ftz ? (neg ? f32_neg_abs<true, true> : f32_neg_abs<true, false>)
                       : (neg ? f32_neg_abs<false, true> : f32_neg_abs<false, false>);
    }
}

void decode_div(Decoder& d) {
    const Type type = d.take_type();
    if (type != Type::kF32 && type != Type::kF64) {
        decode_integer_div(d, type);
        return;
    }
    d.op.op_class = OpClass::kFloat;
    const std::string mode = d.take_any({"approx", "full", "rn", "rz", "rm", "rp"});
    const bool ftz = d.take("ftz");
    operands(d, type, 2);
    if (mode == "rz" || mode == "rm" || mode == "rp") {
        decode_directed(d, type,
                        mode == "rz"   ? Rounding::kZero
                        : mode == "rm" ? Rounding::kDown
                                       : Rounding::kUp,
                        ftz, false);
        return;
    }
    d.op.run = type == Type::kF32 ? f32_binary_handler<FDiv>(ftz, false) : f64_binary<FDiv>;
}

void decode_copysign(Decoder& d) {
    d.op.op_class = OpClass::kFloat;
    const Type type = d.take_type();
    operands(d, type, 2);
    d.op.run = type == Type::kF32 ? copysign_f32 : copysign_f64;
}

}  // namespace

void register_float(DecodeTable& table) {
    table["add"] = decode_add_sub;
    table["sub"] = decode_add_sub;
    table["addc"] = decode_carry_chain;
    table["subc"] = decode_carry_chain;
    table["mul"] = decode_mul_mad;
    table["mad"] = decode_mul_mad;
    table["fma"] = decode_fma;
    table["min"] = decode_min_max;
    table["max"] = decode_min_max;
    table["neg"] = decode_neg_abs;
    table["abs"] = decode_neg_abs;
    table["div"] = decode_div;
    table["rem"] = decode_div;
    table["copysign"] = decode_copysign;
    register_special_functions(table);
}

}  // namespace sim
