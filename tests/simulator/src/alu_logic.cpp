// Logic on integers and predicates, shifts.
#include <type_traits>

#include "integer_handlers.h"

namespace sim {
namespace {

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

void register_logic(DecodeTable& table) {
    for (const char* name : {"and", "or", "xor"}) {
        table[name] = decode_logic;
    }
    table["not"] = decode_not;
    table["cnot"] = decode_not;
    table["shl"] = decode_shift;
    table["shr"] = decode_shift;
    table["shf"] = decode_funnel;
}

}  // namespace sim
