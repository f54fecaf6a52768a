// Bit counting, bit fields, byte permutes and three-input logic.
#include <algorithm>

#include "decoder.h"
#include "lanes.h"

namespace sim {
namespace {

template <class T, class F>
Step unary_to_u32(Warp& w, const Op& op, uint32_t mask) {
    return map1<uint32_t, T>(w, op, mask, F{});
}

struct Popc {
    template <class T>
    uint32_t operator()(T a) const {
        return static_cast<uint32_t>(__builtin_popcountll(a));
    }
};
struct Clz {
    template <class T>
    uint32_t operator()(T a) const {
        return a == 0 ? sizeof(T) * 8 : static_cast<uint32_t>(__builtin_clzll(a)) - (64 - sizeof(T) * 8);
    }
};

uint64_t reverse_bits(uint64_t v, int width) {
    uint64_t result = 0;
    for (int i = 0; i < width; ++i) {
        result |= ((v >> i) & 1) << (width - 1 - i);
    }
    return result;
}
template <class T>
Step brev(Warp& w, const Op& op, uint32_t mask) {
    return map1<T, T>(w, op, mask, [](T a) { return static_cast<T>(reverse_bits(a, sizeof(T) * 8)); });
}

// bfind: position of the most significant set bit (signed: of the first bit unlike the sign).
template <class T>
Step bfind(Warp& w, const Op& op, uint32_t mask) {
    const bool shift_amount = op.code != 0;
    return map1<uint32_t, T>(w, op, mask, [=](T a) {
        const uint64_t value = static_cast<std::make_unsigned_t<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
        if (value == 0) {
            return 0xffffffffu;
        }
        const uint32_t position = 63u - static_cast<uint32_t>(__builtin_clzll(value));
        return shift_amount ? static_cast<uint32_t>(sizeof(T) * 8 - 1) - position : position;
    });
}

template <class T>
Step bfe(Warp& w, const Op& op, uint32_t mask) {
    return map3<T, T, uint32_t, uint32_t>(w, op, mask, [](T a, uint32_t b, uint32_t c) {
        const uint32_t position = b & 0xff;
        const uint32_t length = c & 0xff;
        const bool negative = std::is_signed_v<T> && length != 0 &&
                              ((a >> std::min<uint32_t>(position + length - 1, sizeof(T) * 8 - 1)) & 1) != 0;
        std::make_unsigned_t<T> result = 0;
        for (uint32_t i = 0; i <= sizeof(T) * 8 - 1; ++i) {
            const bool bit =
                i < length && position + i < sizeof(T) * 8 ? ((a >> (position + i)) & 1) != 0 : negative;
            result |= static_cast<std::make_unsigned_t<T>>(bit ? 1 : 0) << i;
        }
        return static_cast<T>(result);
    });
}

// bfi f, a, b, c, d: the low d bits of a into b at bit c.
template <class T>
Step bfi(Warp& w, const Op& op, uint32_t mask) {
    const T* a = source<T>(w, op.a);
    const T* b = source<T>(w, op.b);
    const uint32_t* c = source<uint32_t>(w, op.c);
    const uint32_t* e = source<uint32_t>(w, op.e);
    T* d = destination<T>(w, op.d);
    constexpr uint32_t width = sizeof(T) * 8;
    T result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t position = c[i] & 0xff;
        const uint32_t length = std::min(e[i] & 0xff, width);
        const T ones = length == width ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
        const T field = position >= width ? T{0} : static_cast<T>(ones << position);
        const T bits = position >= width ? T{0} : static_cast<T>(a[i] << position);
        result[i] = static_cast<T>((b[i] & ~field) | (bits & field));
    }
    merge(d, result, mask);
    return Step::kNext;
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t{b} << 32) | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s = (selector >> (4 * i)) & 0xf;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xff;
        if ((s & 8) != 0) {
            byte = (byte & 0x80) != 0 ? 0xff : 0;  // replicate the sign
        }
        result |= byte << (8 * i);
    }
    return result;
}

// The selector of a special prmt mode, as bytes of the generic one.
uint32_t prmt_selector(int mode, uint32_t c) {
    static const uint32_t f4e[4] = {0x3210, 0x4321, 0x5432, 0x6543};
    static const uint32_t b4e[4] = {0x5670, 0x6701, 0x7012, 0x0123};
    static const uint32_t rc8[4] = {0x0000, 0x1111, 0x2222, 0x3333};
    static const uint32_t ecl[4] = {0x3210, 0x3211, 0x3222, 0x3333};
    static const uint32_t ecr[4] = {0x0000, 0x1110, 0x2210, 0x3210};
    static const uint32_t rc16[4] = {0x1010, 0x3232, 0x1010, 0x3232};
    switch (mode) {
        case 1:
            return f4e[c & 3];
        case 2:
            return b4e[c & 3];
        case 3:
            return rc8[c & 3];
        case 4:
            return ecl[c & 3];
        case 5:
            return ecr[c & 3];
        case 6:
            return rc16[c & 3];
        default:
            return c;
    }
}

Step prmt(Warp& w, const Op& op, uint32_t mask) {
    const int mode = op.code;
    return map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, mask, [=](uint32_t a, uint32_t b, uint32_t c) {
        return permute(a, b, prmt_selector(mode, c));
    });
}

Step lop3(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t table = static_cast<uint32_t>(op.imm);
    return map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, mask, [=](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t result = 0;
        for (uint32_t minterm = 0; minterm < 8; ++minterm) {
            const uint32_t use = (table >> minterm & 1u) != 0 ? kAllLanes : 0u;
            result |= use & ((minterm & 4) != 0 ? a : ~a) & ((minterm & 2) != 0 ? b : ~b) &
                      ((minterm & 1) != 0 ? c : ~c);
        }
        return result;
    });
}

template <class T, bool kSigned, bool kAccumulateSigned>
Step dp4a(Warp& w, const Op& op, uint32_t mask) {
    return map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, mask, [](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t sum = c;
        for (int i = 0; i < 4; ++i) {
            const uint32_t x =
                kSigned ? static_cast<uint32_t>(static_cast<int8_t>(a >> (8 * i))) : (a >> (8 * i)) & 0xff;
            const uint32_t y = kAccumulateSigned ? static_cast<uint32_t>(static_cast<int8_t>(b >> (8 * i)))
                                                 : (b >> (8 * i)) & 0xff;
            sum += x * y;
        }
        return sum;
    });
}

// fns: the n-th set bit of a, counted from bit `base`, upwards or downwards.
Step fns(Warp& w, const Op& op, uint32_t mask) {
    return map3<uint32_t, uint32_t, uint32_t, int32_t>(w, op, mask, [](uint32_t a, uint32_t base, int32_t n) {
        if (n == 0) {
            return base < 32 && ((a >> base) & 1) != 0 ? base : 0xffffffffu;
        }
        const int step = n < 0 ? -1 : 1;
        int left = n < 0 ? -n : n;
        for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step) {
            if (((a >> at) & 1) != 0 && --left == 0) {
                return static_cast<uint32_t>(at);
            }
        }
        return 0xffffffffu;
    });
}

void decode_count(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool popc = d.in().opcode == "popc";
    const Type type = d.take_type();
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), type);
    if (bytes_of(type) == 4) {
        d.op.run = popc ? unary_to_u32<uint32_t, Popc> : unary_to_u32<uint32_t, Clz>;
    } else {
        d.op.run = popc ? unary_to_u32<uint64_t, Popc> : unary_to_u32<uint64_t, Clz>;
    }
}

void decode_brev(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const Type type = d.take_type();
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.run = bytes_of(type) == 4 ? brev<uint32_t> : brev<uint64_t>;
}

void decode_bfind(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    d.op.code = d.take("shiftamt");
    const Type type = d.take_type();
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), type);
    switch (type) {
        case Type::kU32:
            d.op.run = bfind<uint32_t>;
            break;
        case Type::kS32:
            d.op.run = bfind<int32_t>;
            break;
        case Type::kU64:
            d.op.run = bfind<uint64_t>;
            break;
        case Type::kS64:
            d.op.run = bfind<int64_t>;
            break;
        default:
            break;
    }
}

void decode_bfe(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const Type type = d.take_type();
    d.need_operands(4, 4);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), Type::kU32);
    d.op.c = d.src(d.operand(3), Type::kU32);
    switch (type) {
        case Type::kU32:
            d.op.run = bfe<uint32_t>;
            break;
        case Type::kS32:
            d.op.run = bfe<int32_t>;
            break;
        case Type::kU64:
            d.op.run = bfe<uint64_t>;
            break;
        case Type::kS64:
            d.op.run = bfe<int64_t>;
            break;
        default:
            break;
    }
}

void decode_bfi(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const Type type = d.take_type();
    d.need_operands(5, 5);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    d.op.c = d.src(d.operand(3), Type::kU32);
    d.op.e = d.src(d.operand(4), Type::kU32);
    d.op.run = bytes_of(type) == 4 ? bfi<uint32_t> : bfi<uint64_t>;
}

void decode_three_words(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const std::string& opcode = d.in().opcode;
    d.need_operands(4, opcode == "lop3" ? 6 : 4);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), Type::kB32);
    d.op.b = d.src(d.operand(2), Type::kB32);
    d.op.c = d.src(d.operand(3), Type::kB32);
    if (opcode == "prmt") {
        d.take_any({"b32"});
        const std::string mode = d.take_any({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, "");
        const char* const names[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
        d.op.code = static_cast<uint16_t>(std::find(names, names + 7, mode) - names);
        d.op.run = prmt;
    } else if (opcode == "lop3") {
        d.take_any({"b32"});
        d.need_operands(5, 5);
        d.op.imm = static_cast<int64_t>(d.integer(d.operand(4)));
        d.op.run = lop3;
    } else {
        d.take_any({"b32"});
        d.op.run = fns;
    }
}

void decode_dp4a(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool a_signed = is_signed(d.take_type());
    const bool b_signed = is_signed(d.take_type());
    d.need_operands(4, 4);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), Type::kB32);
    d.op.b = d.src(d.operand(2), Type::kB32);
    d.op.c = d.src(d.operand(3), Type::kB32);
    d.op.run = a_signed ? (b_signed ? dp4a<int, true, true> : dp4a<int, true, false>)
                        : (b_signed ? dp4a<int, false, true> : dp4a<int, false, false>);
}

}  // namespace

void register_bits(DecodeTable& table) {
    table["popc"] = decode_count;
    table["clz"] = decode_count;
    table["brev"] = decode_brev;
    table["bfind"] = decode_bfind;
    table["bfe"] = decode_bfe;
    table["bfi"] = decode_bfi;
    table["prmt"] = decode_three_words;
    table["lop3"] = decode_three_words;
    table["fns"] = decode_three_words;
    table["dp4a"] = decode_dp4a;
}

}  // namespace sim
