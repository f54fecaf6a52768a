// Integer arithmetic, logic, shifts and bit fields.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "decoder.h"
#include "lanes.h"

namespace sim {
namespace {

template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a + b);
    }
};
struct Sub {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a - b);
    }
};
struct Min {
    template <class T>
    T operator()(T a, T b) const {
        return std::min(a, b);
    }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const {
        return std::max(a, b);
    }
};
struct And {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a & b);
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a | b);
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a ^ b);
    }
};
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
struct Div {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) {
            return static_cast<T>(-1);
        }
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) {
            return static_cast<T>(std::make_unsigned_t<T>(0) - static_cast<std::make_unsigned_t<T>>(a));
        }
        return static_cast<T>(a / b);
    }
};
struct Rem {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) {
            return a;
        }
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) {
            return 0;
        }
        return static_cast<T>(a % b);
    }
};
struct AddSat {
    int32_t operator()(int32_t a, int32_t b) const { return clamp(int64_t{a} + b); }
    static int32_t clamp(int64_t v) {
        return static_cast<int32_t>(std::clamp<int64_t>(v, INT32_MIN, INT32_MAX));
    }
};
struct SubSat {
    int32_t operator()(int32_t a, int32_t b) const { return AddSat::clamp(int64_t{a} - b); }
};

template <class T, class F>
Step binary(Warp& w, const Op& op, uint32_t mask) {
    return map2<T, T, T>(w, op, mask, F{});
}

template <class F>
Handler signed_or_not(Type type) {
    switch (type) {
        case Type::kU16:
            return binary<uint16_t, F>;
        case Type::kS16:
            return binary<int16_t, F>;
        case Type::kU32:
            return binary<uint32_t, F>;
        case Type::kS32:
            return binary<int32_t, F>;
        case Type::kU64:
            return binary<uint64_t, F>;
        case Type::kS64:
            return binary<int64_t, F>;
        default:
            return nullptr;
    }
}

// The sign does not matter: the same bits come out.
template <class F>
Handler by_width(Type type) {
    switch (bytes_of(type)) {
        case 2:
            return binary<uint16_t, F>;
        case 4:
            return binary<uint32_t, F>;
        case 8:
            return binary<uint64_t, F>;
        default:
            return nullptr;
    }
}

void three_operands(Decoder& d, Type type) {
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
}

// add.cc, addc, sub.cc, subc: the carry flag is the predicate behind the constants.
template <class T, bool kSubtract>
Step with_carry(Warp& w, const Op& op, uint32_t mask) {
    T* d = destination<T>(w, op.d);
    const T* a = source<T>(w, op.a);
    const T* b = source<T>(w, op.b);
    uint32_t carry_out = 0;
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const bool carry = op.code != 0 && in_mask(w.preds[kFirstPred], i);
        const unsigned __int128 sum = kSubtract
                                          ? static_cast<unsigned __int128>(a[i]) - b[i] - (carry ? 1u : 0u)
                                          : static_cast<unsigned __int128>(a[i]) + b[i] + (carry ? 1u : 0u);
        d[i] = static_cast<T>(sum);
        carry_out |= static_cast<uint32_t>((sum >> (sizeof(T) * 8)) & 1u) << i;
    }
    if (op.code2 != 0) {
        set_predicate(w, kFirstPred, carry_out, mask);
    }
    return Step::kNext;
}

bool decode_carry(Decoder& d, bool subtract, bool carry_in) {
    const bool carry_out = d.take("cc");
    if (!carry_in && !carry_out) {
        return false;
    }
    const Type type = d.take_type();
    three_operands(d, type);
    d.op.code = carry_in;
    d.op.code2 = carry_out;
    const bool wide = bytes_of(type) == 8;
    d.op.run = subtract ? (wide ? with_carry<uint64_t, true> : with_carry<uint32_t, true>)
                        : (wide ? with_carry<uint64_t, false> : with_carry<uint32_t, false>);
    return true;
}

}  // namespace

void decode_integer_add(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    const bool subtract = d.in().opcode == "sub";
    const bool saturate = d.take("sat");
    if (saturate && type != Type::kS32) {
        d.fail(".sat is for .s32");
    }
    three_operands(d, type);
    if (saturate) {
        d.op.run = subtract ? binary<int32_t, SubSat> : binary<int32_t, AddSat>;
    } else {
        d.op.run = subtract ? by_width<Sub>(type) : by_width<Add>(type);
    }
}

bool decode_add_with_carry(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const std::string& opcode = d.in().opcode;
    return decode_carry(d, opcode[0] == 's', opcode == "addc" || opcode == "subc");
}

void decode_integer_min_max(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    three_operands(d, type);
    d.op.run = d.in().opcode == "min" ? signed_or_not<Min>(type) : signed_or_not<Max>(type);
}

namespace {

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

void decode_integer_div(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    three_operands(d, type);
    d.op.run = d.in().opcode == "div" ? signed_or_not<Div>(type) : signed_or_not<Rem>(type);
}

namespace {

template <class T>
Step logic_pred(Warp& w, const Op& op, uint32_t mask) {
    set_predicate(w, op.p, T{}(predicate(w, op.q), predicate(w, op.a)), mask);
    return Step::kNext;
}

void decode_logic(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const std::string& opcode = d.in().opcode;
    const Type type = d.take_type();
    if (type == Type::kPred) {
        d.need_operands(3, 3);
        d.op.p = d.pred_dest(d.operand(0));
        d.op.q = d.pred_src(d.operand(1));
        d.op.a = d.pred_src(d.operand(2));
        d.op.run = opcode == "and" ? logic_pred<And> : opcode == "or" ? logic_pred<Or> : logic_pred<Xor>;
        return;
    }
    three_operands(d, type);
    d.op.run = opcode == "and"  ? by_width<And>(type)
               : opcode == "or" ? by_width<Or>(type)
                                : by_width<Xor>(type);
}

Step not_pred(Warp& w, const Op& op, uint32_t mask) {
    set_predicate(w, op.p, ~predicate(w, op.q), mask);
    return Step::kNext;
}

template <class T>
Step not_op(Warp& w, const Op& op, uint32_t m) {
    return map1<T, T>(w, op, m, [](T a) { return static_cast<T>(~a); });
}
template <class T>
Step cnot_op(Warp& w, const Op& op, uint32_t m) {
    return map1<T, T>(w, op, m, [](T a) { return static_cast<T>(a == 0 ? 1 : 0); });
}
template <class T>
Step neg_op(Warp& w, const Op& op, uint32_t m) {
    return map1<T, T>(w, op, m, [](T a) { return static_cast<T>(T{0} - a); });
}
template <class T>
Step abs_op(Warp& w, const Op& op, uint32_t m) {
    using U = std::make_unsigned_t<T>;
    return map1<T, T>(w, op, m, [](T a) { return a < 0 ? static_cast<T>(U{0} - static_cast<U>(a)) : a; });
}

void decode_not(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool cnot = d.in().opcode == "cnot";
    const Type type = d.take_type();
    d.need_operands(2, 2);
    if (type == Type::kPred) {
        d.op.p = d.pred_dest(d.operand(0));
        d.op.q = d.pred_src(d.operand(1));
        d.op.run = not_pred;
        return;
    }
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    switch (bytes_of(type)) {
        case 2:
            d.op.run = cnot ? cnot_op<uint16_t> : not_op<uint16_t>;
            break;
        case 4:
            d.op.run = cnot ? cnot_op<uint32_t> : not_op<uint32_t>;
            break;
        default:
            d.op.run = cnot ? cnot_op<uint64_t> : not_op<uint64_t>;
            break;
    }
}

}  // namespace

void decode_integer_neg_abs(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    const bool neg = d.in().opcode == "neg";
    switch (type) {
        case Type::kS16:
            d.op.run = neg ? neg_op<uint16_t> : abs_op<int16_t>;
            break;
        case Type::kS32:
            d.op.run = neg ? neg_op<uint32_t> : abs_op<int32_t>;
            break;
        case Type::kS64:
            d.op.run = neg ? neg_op<uint64_t> : abs_op<int64_t>;
            break;
        default:
            break;
    }
}

namespace {

// Shift amounts beyond the width give zeros (or the sign).
template <class T>
Step shl(Warp& w, const Op& op, uint32_t mask) {
    constexpr uint32_t width = sizeof(T) * 8;
    return map2<T, T, uint32_t>(w, op, mask,
                                [](T a, uint32_t n) { return n >= width ? T{0} : static_cast<T>(a << n); });
}
template <class T>
Step shr(Warp& w, const Op& op, uint32_t mask) {
    constexpr uint32_t width = sizeof(T) * 8;
    return map2<T, T, uint32_t>(w, op, mask, [](T a, uint32_t n) {
        const T sign = static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0);
        return n >= width ? sign : static_cast<T>(a >> n);
    });
}

void decode_shift(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const Type type = d.take_type();
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), Type::kU32);
    if (d.in().opcode == "shl") {
        d.op.run = bytes_of(type) == 2 ? shl<uint16_t> : bytes_of(type) == 4 ? shl<uint32_t> : shl<uint64_t>;
        return;
    }
    switch (type) {
        case Type::kS16:
            d.op.run = shr<int16_t>;
            break;
        case Type::kS32:
            d.op.run = shr<int32_t>;
            break;
        case Type::kS64:
            d.op.run = shr<int64_t>;
            break;
        case Type::kU16:
        case Type::kB16:
            d.op.run = shr<uint16_t>;
            break;
        case Type::kU32:
        case Type::kB32:
            d.op.run = shr<uint32_t>;
            break;
        case Type::kU64:
        case Type::kB64:
            d.op.run = shr<uint64_t>;
            break;
        default:
            break;
    }
}

// shf: a 32-bit window of the 64 bits b:a.
template <bool kLeft, bool kWrap>
Step funnel(Warp& w, const Op& op, uint32_t mask) {
    return map3<uint32_t, uint32_t, uint32_t, uint32_t>(
        w, op, mask, [](uint32_t low, uint32_t high, uint32_t amount) {
            const uint32_t n = kWrap ? amount & 31u : std::min(amount, 32u);
            const uint64_t both = (uint64_t{high} << 32) | low;
            return static_cast<uint32_t>(kLeft ? (both << n) >> 32 : both >> n);
        });
}

void decode_funnel(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool left = d.take_any({"l", "r"}) == "l";
    const bool wrap = d.take_any({"wrap", "clamp"}) == "wrap";
    const Type type = d.take_type();
    d.need_operands(4, 4);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    d.op.c = d.src(d.operand(3), Type::kU32);
    d.op.run = left ? (wrap ? funnel<true, true> : funnel<true, false>)
                    : (wrap ? funnel<false, true> : funnel<false, false>);
}

}  // namespace

void register_bits(DecodeTable& table);

void register_integer(DecodeTable& table) {
    for (const char* name : {"and", "or", "xor"}) {
        table[name] = decode_logic;
    }
    table["not"] = decode_not;
    table["cnot"] = decode_not;
    table["shl"] = decode_shift;
    table["shr"] = decode_shift;
    table["shf"] = decode_funnel;
    table["mul24"] = decode_mul24;
    register_bits(table);
}

}  // namespace sim
