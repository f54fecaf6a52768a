// cvt between scalars. Packed and eight-bit forms are in convert_packed.cpp.
#include <cmath>
#include <limits>

#include "convert_packed.h"
#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"

namespace sim {
namespace {

enum Flags : uint32_t { kFtz = 1, kSat = 2, kRelu = 4, kSatfinite = 8, kToInteger = 16 };

// Everything a conversion needs, packed into the Op.
struct Conversion {
    Type to, from;
    Rounding rounding;
    uint32_t flags;
    uint32_t to_bytes, from_bytes;  // of the registers
};
Conversion conversion_of(const Op& op) {
    return {static_cast<Type>(op.code),
            static_cast<Type>(op.code2),
            static_cast<Rounding>(op.imm & 0xff),
            static_cast<uint32_t>(op.imm >> 8),
            op.target,
            op.target2};
}

bool is_float(Type type) {
    return type == Type::kF16 || type == Type::kBf16 || type == Type::kF32 || type == Type::kF64 ||
           type == Type::kTf32;
}

uint64_t load(const uint8_t* registers, uint32_t bytes, int lane) {
    uint64_t value = 0;
    std::memcpy(&value, registers + static_cast<size_t>(lane) * bytes, bytes);
    return value;
}

__int128 integer_value(uint64_t raw, Type type) {
    switch (type) {
        case Type::kU8:
        case Type::kB8:
            return static_cast<uint8_t>(raw);
        case Type::kS8:
            return static_cast<int8_t>(raw);
        case Type::kU16:
        case Type::kB16:
            return static_cast<uint16_t>(raw);
        case Type::kS16:
            return static_cast<int16_t>(raw);
        case Type::kU32:
        case Type::kB32:
            return static_cast<uint32_t>(raw);
        case Type::kS32:
            return static_cast<int32_t>(raw);
        case Type::kS64:
            return static_cast<int64_t>(raw);
        default:
            return raw;
    }
}

double float_value(uint64_t raw, Type type, bool ftz) {
    switch (type) {
        case Type::kF16:
            return decode_float(static_cast<uint32_t>(raw), kFormatF16);
        case Type::kBf16:
            return decode_float(static_cast<uint32_t>(raw), kFormatBf16);
        case Type::kF64:
            return as_double(raw);
        default: {
            const float value = as_float(static_cast<uint32_t>(raw));
            return ftz ? flush(value) : value;
        }
    }
}

double round_to_integer(double x, Rounding rounding) {
    switch (rounding) {
        case Rounding::kZero:
            return std::trunc(x);
        case Rounding::kDown:
            return std::floor(x);
        case Rounding::kUp:
            return std::ceil(x);
        default:
            return std::nearbyint(x);
    }
}

// The float (or double) nearest to an exact value, in a rounding mode.
template <class T>
T rounded_to(long double exact, Rounding rounding) {
    T value = static_cast<T>(exact);
    if (std::isnan(value) || rounding == Rounding::kNearestEven || static_cast<long double>(value) == exact) {
        return value;
    }
    const T infinity = std::numeric_limits<T>::infinity();
    const bool above = static_cast<long double>(value) > exact;
    const bool down = rounding == Rounding::kDown || (rounding == Rounding::kZero && exact > 0);
    const bool up = rounding == Rounding::kUp || (rounding == Rounding::kZero && exact < 0);
    if (above && down) {
        return std::nextafter(value, -infinity);
    }
    if (!above && up) {
        return std::nextafter(value, infinity);
    }
    return value;
}

uint64_t to_integer(__int128 value, Type type, bool saturate) {
    if (saturate) {
        const int bits = static_cast<int>(bytes_of(type)) * 8;
        const __int128 one = 1;
        const __int128 low = is_signed(type) ? -(one << (bits - 1)) : 0;
        const __int128 high = is_signed(type) ? (one << (bits - 1)) - 1 : (one << bits) - 1;
        value = value < low ? low : value > high ? high : value;
    }
    return static_cast<uint64_t>(value);
}

uint64_t float_to_integer(double value, const Conversion& c) {
    if (std::isnan(value)) {
        // NaN gives 0 for narrow integers; the hardware's 64-bit forms give the sign bit.
        return bytes_of(c.to) == 8 ? uint64_t{1} << 63 : 0;
    }
    const double rounded = round_to_integer(value, c.rounding);
    const double limit = 1.9e19;
    const double bounded = rounded > limit ? limit : rounded < -limit ? -limit : rounded;
    return to_integer(static_cast<__int128>(bounded), c.to, true);
}

uint64_t to_float(long double exact, const Conversion& c) {
    if ((c.flags & kSat) != 0) {
        exact = !(exact > 0) ? 0.0L : exact > 1 ? 1.0L : exact;
    }
    if ((c.flags & kRelu) != 0 && !std::isnan(exact) && !(exact > 0)) {
        exact = 0.0L;
    }
    const bool saturate = (c.flags & kSatfinite) != 0;
    switch (c.to) {
        case Type::kF64:
            return as_bits(rounded_to<double>(exact, c.rounding));
        case Type::kF32: {
            const float value = canonical(rounded_to<float>(exact, c.rounding));
            return as_bits((c.flags & kFtz) != 0 ? flush(value) : value);
        }
        case Type::kTf32: {
            const uint32_t code = encode_float(static_cast<double>(exact), kFormatTf32, c.rounding, saturate);
            return code << 13;
        }
        default: {
            const FloatFormat& format = c.to == Type::kF16 ? kFormatF16 : kFormatBf16;
            // A double may not hold a 64-bit integer: round it to odd first.
            double narrow = static_cast<double>(exact);
            const long double lost = exact - static_cast<long double>(narrow);
            if (lost != 0 && (as_bits(narrow) & 1) == 0) {
                narrow = as_double(as_bits(narrow) + ((lost > 0) == (exact > 0) ? 1 : uint64_t(-1)));
            }
            return encode_float(narrow, format, c.rounding, saturate);
        }
    }
}

uint64_t convert_one(uint64_t raw, const Conversion& c) {
    if (!is_float(c.from)) {
        const __int128 value = integer_value(raw, c.from);
        return is_float(c.to) ? to_float(static_cast<long double>(value), c)
                              : to_integer(value, c.to, (c.flags & kSat) != 0);
    }
    const double value = float_value(raw, c.from, (c.flags & kFtz) != 0);
    if (!is_float(c.to)) {
        return float_to_integer(value, c);
    }
    if ((c.flags & kToInteger) != 0) {
        return to_float(round_to_integer(value, c.rounding), c);
    }
    return to_float(value, c);
}

Step convert(Warp& w, const Op& op, uint32_t mask) {
    const Conversion c = conversion_of(op);
    const uint8_t* from = source<uint8_t>(w, op.a);
    uint8_t* to = destination<uint8_t>(w, op.d);
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        uint64_t value = convert_one(load(from, c.from_bytes, i), c);
        if (!is_float(c.to)) {
            value = static_cast<uint64_t>(integer_value(value, c.to));  // extend into a wider register
        }
        std::memcpy(to + static_cast<size_t>(i) * c.to_bytes, &value, c.to_bytes);
    }
    return Step::kNext;
}

// --- the frequent ones, as vector code ---

template <class D, class S>
Step cast(Warp& w, const Op& op, uint32_t mask) {
    return map1<D, S>(w, op, mask, [](S a) { return static_cast<D>(a); });
}
Step f32_to_s32(Warp& w, const Op& op, uint32_t mask) {
    return map1<int32_t, float>(w, op, mask, [](float a) {
        const float low = a < -2147483648.0f ? -2147483648.0f : a;
        const int32_t value =
            low >= 2147483648.0f ? INT32_MAX : static_cast<int32_t>(low != low ? 0.0f : low);
        return value;
    });
}
Step f16_to_f32(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, uint16_t>(w, op, mask, [](uint16_t a) { return canonical(half_to_float(a)); });
}
Step bf16_to_f32(Warp& w, const Op& op, uint32_t mask) {
    return map1<float, uint16_t>(w, op, mask, [](uint16_t a) { return canonical(bf16_to_float(a)); });
}
Step f32_to_f16(Warp& w, const Op& op, uint32_t mask) {
    return map1<uint16_t, float>(w, op, mask, [](float a) { return float_to_half(a); });
}
Step f32_to_bf16(Warp& w, const Op& op, uint32_t mask) {
    return map1<uint16_t, float>(w, op, mask, [](float a) { return float_to_bf16(a); });
}

Handler fast_handler(const Conversion& c) {
    const bool exact_widths = c.to_bytes == bytes_of(c.to) && c.from_bytes == bytes_of(c.from);
    if (!exact_widths || (c.flags & ~(kFtz | kToInteger)) != 0) {
        return nullptr;
    }
    const auto is = [&](Type to, Type from) { return c.to == to && c.from == from; };
    if (is(Type::kS64, Type::kS32)) {
        return cast<int64_t, int32_t>;
    }
    if (is(Type::kU64, Type::kU32)) {
        return cast<uint64_t, uint32_t>;
    }
    if (is(Type::kU32, Type::kU64)) {
        return cast<uint32_t, uint64_t>;
    }
    if (is(Type::kU32, Type::kU16)) {
        return cast<uint32_t, uint16_t>;
    }
    if (is(Type::kU16, Type::kU32)) {
        return cast<uint16_t, uint32_t>;
    }
    if (is(Type::kU16, Type::kU64)) {
        return cast<uint16_t, uint64_t>;
    }
    if (is(Type::kF16, Type::kF32) && c.flags == 0 && c.rounding == Rounding::kNearestEven) {
        return f32_to_f16;
    }
    if (is(Type::kBf16, Type::kF32) && c.flags == 0 && c.rounding == Rounding::kNearestEven) {
        return f32_to_bf16;
    }
    if (is(Type::kF32, Type::kF16) && c.flags == 0) {
        return f16_to_f32;
    }
    if (is(Type::kF32, Type::kBf16) && c.flags == 0) {
        return bf16_to_f32;
    }
    if (is(Type::kF32, Type::kS32) && c.rounding == Rounding::kNearestEven) {
        return cast<float, int32_t>;
    }
    if (is(Type::kF32, Type::kU32) && c.rounding == Rounding::kNearestEven) {
        return cast<float, uint32_t>;
    }
    if (is(Type::kS32, Type::kF32) && c.rounding == Rounding::kZero) {
        return f32_to_s32;
    }
    return nullptr;
}

Rounding take_cvt_rounding(Decoder& d, bool* to_integer) {
    const std::string mode = d.take_any({"rni", "rzi", "rmi", "rpi", "rna", "rn", "rz", "rm", "rp"}, "rn");
    *to_integer = mode.size() == 3 && mode[2] == 'i';
    switch (mode[1]) {
        case 'z':
            return Rounding::kZero;
        case 'm':
            return Rounding::kDown;
        case 'p':
            return Rounding::kUp;
        default:
            return mode == "rna" ? Rounding::kNearestAway : Rounding::kNearestEven;
    }
}

void decode_cvt(Decoder& d) {
    d.op.op_class = OpClass::kConvert;
    bool to_integer = false;
    Conversion c{};
    c.rounding = take_cvt_rounding(d, &to_integer);
    c.flags = (d.take("ftz") ? kFtz : 0u) | (d.take("satfinite") ? kSatfinite : 0u) |
              (d.take("sat") ? kSat : 0u) | (d.take("relu") ? kRelu : 0u) | (to_integer ? kToInteger : 0u);
    c.to = d.take_type();
    c.from = d.take_type();
    if (is_packed(c.to) || is_packed(c.from)) {
        decode_packed_cvt(d, c.to, c.from, c.rounding, (c.flags & kSatfinite) != 0, (c.flags & kRelu) != 0);
        return;
    }
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), std::max(bytes_of(c.to), 2u), true);
    d.op.a = d.src(d.operand(1), c.from, true);
    c.to_bytes =
        d.operand(0).kind == Operand::kSink ? std::max(bytes_of(c.to), 2u) : d.width_of(d.operand(0));
    c.from_bytes =
        d.operand(1).kind == Operand::kRegister ? d.width_of(d.operand(1)) : std::max(bytes_of(c.from), 2u);
    d.op.code = static_cast<uint16_t>(c.to);
    d.op.code2 = static_cast<uint16_t>(c.from);
    d.op.imm = static_cast<int64_t>(c.rounding) | static_cast<int64_t>(c.flags) << 8;
    d.op.target = c.to_bytes;
    d.op.target2 = c.from_bytes;
    const Handler fast = fast_handler(c);
    d.op.run = fast != nullptr ? fast : convert;
}

}  // namespace

void register_convert(DecodeTable& table) {
    table["cvt"] = decode_cvt;
}

}  // namespace sim
