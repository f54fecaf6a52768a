// setp and set.
#include <cmath>

#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"

namespace sim {
namespace {

struct Eq {
    template <class T>
    bool operator()(T a, T b) const {
        return a == b;
    }
};
struct Ne {
    template <class T>
    bool operator()(T a, T b) const {
        return a != b;
    }
};
struct Lt {
    template <class T>
    bool operator()(T a, T b) const {
        return a < b;
    }
};
struct Le {
    template <class T>
    bool operator()(T a, T b) const {
        return a <= b;
    }
};
struct Gt {
    template <class T>
    bool operator()(T a, T b) const {
        return a > b;
    }
};
struct Ge {
    template <class T>
    bool operator()(T a, T b) const {
        return a >= b;
    }
};
// Unordered: also true when an operand is NaN. (For floats, `ne` is false on NaN and `neu` true.)
struct NeOrdered {
    template <class T>
    bool operator()(T a, T b) const {
        return a < b || a > b;
    }
};
struct Equ {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a < b || a > b);
    }
};
struct Ltu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a >= b);
    }
};
struct Leu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a > b);
    }
};
struct Gtu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a <= b);
    }
};
struct Geu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a < b);
    }
};
struct Num {
    template <class T>
    bool operator()(T a, T b) const {
        return a == a && b == b;
    }
};
struct Nan {
    template <class T>
    bool operator()(T a, T b) const {
        return a != a || b != b;
    }
};

using Compare = uint32_t (*)(const Warp&, const Op&);

template <class T, class F>
uint32_t plain(const Warp& w, const Op& op) {
    return compare_lanes<T>(w, op, F{});
}
template <class F>
uint32_t flushed(const Warp& w, const Op& op) {
    return compare_lanes<float>(w, op, [](float a, float b) { return F{}(flush(a), flush(b)); });
}
template <class F, bool kBf16>
uint32_t halves(const Warp& w, const Op& op) {
    return compare_lanes<uint16_t>(w, op, [](uint16_t a, uint16_t b) {
        return kBf16 ? F{}(bf16_to_float(a), bf16_to_float(b)) : F{}(half_to_float(a), half_to_float(b));
    });
}

template <class F>
Compare integer_compare(Type type) {
    switch (type) {
        case Type::kB16:
        case Type::kU16:
            return plain<uint16_t, F>;
        case Type::kS16:
            return plain<int16_t, F>;
        case Type::kB32:
        case Type::kU32:
            return plain<uint32_t, F>;
        case Type::kS32:
            return plain<int32_t, F>;
        case Type::kB64:
        case Type::kU64:
            return plain<uint64_t, F>;
        case Type::kS64:
            return plain<int64_t, F>;
        default:
            return nullptr;
    }
}

template <class F>
Compare float_compare(Type type, bool ftz) {
    switch (type) {
        case Type::kF32:
            return ftz ? flushed<F> : plain<float, F>;
        case Type::kF64:
            return plain<double, F>;
        case Type::kF16:
            return halves<F, false>;
        case Type::kBf16:
            return halves<F, true>;
        default:
            return nullptr;
    }
}

Compare find_compare(const std::string& name, Type type, bool ftz) {
    const bool real = type == Type::kF32 || type == Type::kF64 || type == Type::kF16 || type == Type::kBf16;
    if (real) {
        if (name == "eq") {
            return float_compare<Eq>(type, ftz);
        }
        if (name == "ne") {
            return float_compare<NeOrdered>(type, ftz);
        }
        if (name == "lt") {
            return float_compare<Lt>(type, ftz);
        }
        if (name == "le") {
            return float_compare<Le>(type, ftz);
        }
        if (name == "gt") {
            return float_compare<Gt>(type, ftz);
        }
        if (name == "ge") {
            return float_compare<Ge>(type, ftz);
        }
        if (name == "equ") {
            return float_compare<Equ>(type, ftz);
        }
        if (name == "neu") {
            return float_compare<Ne>(type, ftz);
        }
        if (name == "ltu") {
            return float_compare<Ltu>(type, ftz);
        }
        if (name == "leu") {
            return float_compare<Leu>(type, ftz);
        }
        if (name == "gtu") {
            return float_compare<Gtu>(type, ftz);
        }
        if (name == "geu") {
            return float_compare<Geu>(type, ftz);
        }
        if (name == "num") {
            return float_compare<Num>(type, ftz);
        }
        return float_compare<Nan>(type, ftz);
    }
    if (name == "eq") {
        return integer_compare<Eq>(type);
    }
    if (name == "ne") {
        return integer_compare<Ne>(type);
    }
    if (name == "lt" || name == "lo") {
        return integer_compare<Lt>(type);
    }
    if (name == "le" || name == "ls") {
        return integer_compare<Le>(type);
    }
    if (name == "gt" || name == "hi") {
        return integer_compare<Gt>(type);
    }
    if (name == "ge" || name == "hs") {
        return integer_compare<Ge>(type);
    }
    return nullptr;
}

// The comparison is chosen while decoding and kept in op.imm.
uint32_t evaluate(const Warp& w, const Op& op) {
    return reinterpret_cast<Compare>(op.imm)(w, op);
}

uint32_t combine(uint16_t operation, uint32_t a, uint32_t b) {
    return operation == 1 ? a & b : operation == 2 ? a | b : operation == 3 ? a ^ b : a;
}

Step setp(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t result = evaluate(w, op);
    const uint32_t other = op.c == kNone ? 0 : predicate(w, op.c);
    if (op.p != kNone) {
        set_predicate(w, op.p, combine(op.code, result, other), mask);
    }
    if (op.q != kNone) {
        set_predicate(w, op.q, combine(op.code, ~result, other), mask);
    }
    return Step::kNext;
}

Step set(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t other = op.c == kNone ? 0 : predicate(w, op.c);
    const uint32_t result = combine(op.code, evaluate(w, op), other);
    uint32_t values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = in_mask(result, i) ? op.target : 0;
    }
    merge(destination<uint32_t>(w, op.d), values, mask);
    return Step::kNext;
}

void decode_compare(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool to_register = d.in().opcode == "set";
    const std::string name = d.take_any({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ",
                                         "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
    const std::string boolean = d.take_any({"and", "or", "xor"}, "");
    const bool ftz = d.take("ftz");
    const Type result = to_register ? d.take_type() : Type::kNone;
    const Type type = d.take_type();
    d.need_operands(3, 4);
    const Compare compare = find_compare(name, type, ftz);
    if (compare == nullptr) {
        return;
    }
    d.op.imm = reinterpret_cast<int64_t>(compare);
    d.op.code = boolean == "and" ? 1 : boolean == "or" ? 2 : boolean == "xor" ? 3 : 0;
    if ((d.op.code != 0) != (d.operand_count() == 4)) {
        d.fail("a boolean operator goes with a fourth operand");
    }
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    if (d.operand_count() == 4) {
        d.op.c = d.pred_src(d.operand(3));
    }
    if (to_register) {
        if (bytes_of(result) != 4) {
            d.fail("set writes 32 bits");
        }
        d.op.d = d.dest(d.operand(0), 4);
        d.op.target = result == Type::kF32 ? as_bits(1.0f) : 0xffffffffu;
        d.op.run = set;
        return;
    }
    d.op.p = d.pred_dest(d.operand(0));
    if (!d.operand(0).elements.empty()) {
        d.op.q = d.pred_dest(d.operand(0).elements[0]);
    }
    d.op.run = setp;
}

}  // namespace

void register_compare(DecodeTable& table) {
    table["setp"] = decode_compare;
    table["set"] = decode_compare;
}

}  // namespace sim
