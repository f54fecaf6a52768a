// Integer multiplication: the low half, the high half, the whole, 24 bits; with and without addition.
#include <type_traits>

#include "alu_families.h"
#include "integer_handlers.h"

namespace sim {
namespace {

template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct MulLo {
    template <class T>
    T operator()(T a, T b) const {
        using U = std::make_unsigned_t<Wide<uint32_t>>;
        return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
    }
};
struct MulHi {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> (sizeof(T) * 8));
    }
};

template <class T, class W>
Step mul_wide(Warp& w, const Op& op, uint32_t mask) {
    return map2<W, T, T>(w, op, mask,
                         [](T a, T b) { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); });
}
template <class T, class W>
Step mad_wide(Warp& w, const Op& op, uint32_t mask) {
    return map3<W, T, T, W>(w, op, mask, [](T a, T b, W c) {
        using U = std::make_unsigned_t<W>;
        return static_cast<W>(static_cast<U>(static_cast<W>(a) * static_cast<W>(b)) + static_cast<U>(c));
    });
}
template <class T>
Step mad_lo(Warp& w, const Op& op, uint32_t mask) {
    return map3<T, T, T, T>(w, op, mask, [](T a, T b, T c) {
        return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + static_cast<uint64_t>(c));
    });
}
template <class T>
Step mad_hi(Warp& w, const Op& op, uint32_t mask) {
    return map3<T, T, T, T>(w, op, mask, [](T a, T b, T c) {
        using U = std::make_unsigned_t<T>;
        return static_cast<T>(static_cast<U>(MulHi{}(a, b)) + static_cast<U>(c));
    });
}

Handler wide_handler(Type type, bool mad) {
    switch (type) {
        case Type::kU16:
            return mad ? mad_wide<uint16_t, uint32_t> : mul_wide<uint16_t, uint32_t>;
        case Type::kS16:
            return mad ? mad_wide<int16_t, int32_t> : mul_wide<int16_t, int32_t>;
        case Type::kU32:
            return mad ? mad_wide<uint32_t, uint64_t> : mul_wide<uint32_t, uint64_t>;
        case Type::kS32:
            return mad ? mad_wide<int32_t, int64_t> : mul_wide<int32_t, int64_t>;
        default:
            return nullptr;
    }
}
Handler mad_lo_handler(Type type) {
    switch (bytes_of(type)) {
        case 2:
            return mad_lo<uint16_t>;
        case 4:
            return mad_lo<uint32_t>;
        default:
            return mad_lo<uint64_t>;
    }
}
Handler mad_hi_handler(Type type) {
    switch (type) {
        case Type::kU32:
            return mad_hi<uint32_t>;
        case Type::kS32:
            return mad_hi<int32_t>;
        case Type::kU64:
            return mad_hi<uint64_t>;
        case Type::kS64:
            return mad_hi<int64_t>;
        default:
            return nullptr;
    }
}

Type widened(Type type) {
    switch (type) {
        case Type::kU16:
            return Type::kU32;
        case Type::kS16:
            return Type::kS32;
        case Type::kU32:
            return Type::kU64;
        case Type::kS32:
            return Type::kS64;
        default:
            return Type::kNone;
    }
}

int32_t low24(int32_t v) {
    return (v << 8) >> 8;
}
Step mul24(Warp& w, const Op& op, uint32_t mask) {
    return map2<int32_t, int32_t, int32_t>(
        w, op, mask, [](int32_t a, int32_t b) { return static_cast<int32_t>(int64_t{low24(a)} * low24(b)); });
}
void decode_mul24(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    d.take_any({"lo"});
    const Type type = d.take_type();
    if (type != Type::kS32) {
        d.fail("only .lo.s32 is supported");
    }
    three_operands(d, type);
    d.op.run = mul24;
}

}  // namespace

void decode_integer_mul(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    const bool mad = d.in().opcode == "mad";
    const std::string part = d.take_any({"lo", "hi", "wide"});
    const Type result = part == "wide" ? widened(type) : type;
    d.need_operands(mad ? 4 : 3, mad ? 4 : 3);
    d.op.d = d.dest(d.operand(0), bytes_of(result));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    if (mad) {
        d.op.c = d.src(d.operand(3), result);
    }
    if (part == "wide") {
        d.op.run = wide_handler(type, mad);
    } else if (part == "lo") {
        d.op.run = mad ? mad_lo_handler(type) : by_width<MulLo>(type);
    } else {
        d.op.run = mad ? mad_hi_handler(type) : signed_or_not<MulHi>(type);
    }
}

void register_multiply(DecodeTable& table) {
    table["mul24"] = decode_mul24;
}

}  // namespace sim
