// Integer addition with its carries, minimum and maximum, division, sign.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "alu_families.h"
#include "integer_handlers.h"

namespace sim {
namespace {

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

template <class T>
Step neg_op(Warp& w, const Op& op, uint32_t m) {
    return map1<T, T>(w, op, m, [](T a) { return static_cast<T>(T{0} - a); });
}
template <class T>
Step abs_op(Warp& w, const Op& op, uint32_t m) {
    using U = std::make_unsigned_t<T>;
    return map1<T, T>(w, op, m, [](T a) { return a < 0 ? static_cast<T>(U{0} - static_cast<U>(a)) : a; });
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

void decode_integer_div(Decoder& d, Type type) {
    d.op.op_class = OpClass::kAlu;
    three_operands(d, type);
    d.op.run = d.in().opcode == "div" ? signed_or_not<Div>(type) : signed_or_not<Rem>(type);
}

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

}  // namespace sim
