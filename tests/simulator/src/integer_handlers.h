// What the integer instructions share: handlers by type, three operands of one type.
#pragma once

#include "decoder.h"
#include "lanes.h"

namespace sim {

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

inline void three_operands(Decoder& d, Type type) {
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
}

}  // namespace sim
