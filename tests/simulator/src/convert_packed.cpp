#include "convert_packed.h"

#include <cmath>

#include "lanes.h"

namespace sim {
namespace {

const FloatFormat& format_of(Type type) {
    switch (type) {
        case Type::kF16x2:
            return kFormatF16;
        case Type::kBf16x2:
            return kFormatBf16;
        case Type::kE4m3x2:
            return kFormatE4m3;
        default:
            return kFormatE5m2;
    }
}

bool is_eight_bit(Type type) {
    return type == Type::kE4m3x2 || type == Type::kE5m2x2;
}

double clipped(double value, bool relu) {
    return relu && !std::isnan(value) && !(value > 0) ? 0.0 : value;
}

// d = {high: a, low: b}
Step from_two_floats(Warp& w, const Op& op, uint32_t mask) {
    const Type to = static_cast<Type>(op.code);
    const FloatFormat& format = format_of(to);
    const Rounding rounding = static_cast<Rounding>(op.imm & 0xff);
    const bool satfinite = (op.imm & 0x100) != 0;
    const bool relu = (op.imm & 0x200) != 0;
    const int bits = is_eight_bit(to) ? 8 : 16;
    const float* a = source<float>(w, op.a);
    const float* b = source<float>(w, op.b);
    uint32_t result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t high = encode_float(clipped(a[i], relu), format, rounding, satfinite);
        const uint32_t low = encode_float(clipped(b[i], relu), format, rounding, satfinite);
        result[i] = high << bits | low;
    }
    if (bits == 16) {
        merge(destination<uint32_t>(w, op.d), result, mask);
        return Step::kNext;
    }
    uint16_t narrow[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        narrow[i] = static_cast<uint16_t>(result[i]);
    }
    merge(destination<uint16_t>(w, op.d), narrow, mask);
    return Step::kNext;
}

Step bf16x2_fast(Warp& w, const Op& op, uint32_t mask) {
    return map2<uint32_t, float, float>(w, op, mask, [](float a, float b) {
        return static_cast<uint32_t>(float_to_bf16(a)) << 16 | float_to_bf16(b);
    });
}
Step f16x2_fast(Warp& w, const Op& op, uint32_t mask) {
    return map2<uint32_t, float, float>(w, op, mask, [](float a, float b) {
        return static_cast<uint32_t>(float_to_half(a)) << 16 | float_to_half(b);
    });
}
Step e4m3x2_fast(Warp& w, const Op& op, uint32_t mask) {
    return map2<uint16_t, float, float>(w, op, mask, [](float a, float b) {
        return static_cast<uint16_t>(static_cast<uint32_t>(float_to_e4m3(a)) << 8 | float_to_e4m3(b));
    });
}

Step eight_bit_to_halves(Warp& w, const Op& op, uint32_t mask) {
    const FloatFormat& format = format_of(static_cast<Type>(op.code2));
    const bool relu = (op.imm & 0x200) != 0;
    return map1<uint32_t, uint16_t>(w, op, mask, [&](uint16_t a) {
        const auto one = [&](uint32_t code) {
            return encode_float(clipped(decode_float(code & 0xff, format), relu), kFormatF16,
                                Rounding::kNearestEven, false);
        };
        return one(a) | one(a >> 8) << 16;
    });
}

Step halves_to_eight_bit(Warp& w, const Op& op, uint32_t mask) {
    const FloatFormat& format = format_of(static_cast<Type>(op.code));
    const FloatFormat& from = format_of(static_cast<Type>(op.code2));
    const bool relu = (op.imm & 0x200) != 0;
    return map1<uint16_t, uint32_t>(w, op, mask, [&](uint32_t a) {
        const auto one = [&](uint32_t code) {
            return encode_float(clipped(decode_float(code & 0xffff, from), relu), format,
                                Rounding::kNearestEven, true);
        };
        return static_cast<uint16_t>(one(a) | one(a >> 16) << 8);
    });
}

}  // namespace

bool is_packed(Type type) {
    return type == Type::kF16x2 || type == Type::kBf16x2 || is_eight_bit(type);
}

void decode_packed_cvt(Decoder& d, Type to, Type from, Rounding rounding, bool satfinite, bool relu) {
    d.op.code = static_cast<uint16_t>(to);
    d.op.code2 = static_cast<uint16_t>(from);
    d.op.imm = static_cast<int64_t>(rounding) | (satfinite ? 0x100 : 0) | (relu ? 0x200 : 0);
    d.op.d = d.dest(d.operand(0), bytes_of(to));
    if (from == Type::kF32) {
        d.need_operands(3, 3);
        d.op.a = d.src(d.operand(1), from);
        d.op.b = d.src(d.operand(2), from);
        if (is_eight_bit(to) && !satfinite) {
            d.fail("conversions to 8-bit floats need .satfinite");
        }
        const bool plain = rounding == Rounding::kNearestEven && !relu;
        d.op.run = from_two_floats;
        if (plain && to == Type::kBf16x2 && !satfinite) {
            d.op.run = bf16x2_fast;
        } else if (plain && to == Type::kF16x2 && !satfinite) {
            d.op.run = f16x2_fast;
        } else if (plain && to == Type::kE4m3x2) {
            d.op.run = e4m3x2_fast;
        }
        return;
    }
    d.need_operands(2, 2);
    d.op.a = d.src(d.operand(1), from);
    if (is_eight_bit(from) && to == Type::kF16x2) {
        d.op.run = eight_bit_to_halves;
    } else if (is_eight_bit(to) && from == Type::kF16x2) {
        d.op.run = halves_to_eight_bit;
    }
}

}  // namespace sim
