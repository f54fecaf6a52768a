// mov in all its forms, selects, and conversions between address spaces.
#include "decoder.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

template <class T>
Step move(Warp& w, const Op& op, uint32_t mask) {
    return map1<T, T>(w, op, mask, [](T a) { return a; });
}

Handler move_handler(uint32_t bytes) {
    return bytes == 2 ? move<uint16_t> : bytes == 4 ? move<uint32_t> : move<uint64_t>;
}

Step move_pred(Warp& w, const Op& op, uint32_t mask) {
    set_predicate(w, op.p, predicate(w, op.q), mask);
    return Step::kNext;
}

// {a, b, ...} -> d, each part sizeof(P) bytes.
template <class D, class P>
Step pack(Warp& w, const Op& op, uint32_t mask) {
    D result[kLanes] = {};
    for (int part = 0; part < op.list_size; ++part) {
        const P* values = source<P>(w, w.program->lists[op.list + static_cast<uint32_t>(part)]);
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            result[i] |=
                static_cast<D>(static_cast<D>(values[i]) << (part * static_cast<int>(sizeof(P)) * 8));
        }
    }
    merge(destination<D>(w, op.d), result, mask);
    return Step::kNext;
}

template <class D, class P>
Step unpack(Warp& w, const Op& op, uint32_t mask) {
    D value[kLanes];
    std::memcpy(value, source<D>(w, op.a), sizeof value);
    for (int part = 0; part < op.list_size; ++part) {
        P result[kLanes];
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            result[i] = static_cast<P>(value[i] >> (part * static_cast<int>(sizeof(P)) * 8));
        }
        merge(destination<P>(w, w.program->lists[op.list + static_cast<uint32_t>(part)]), result, mask);
    }
    return Step::kNext;
}

void decode_vector_move(Decoder& d, Type type, bool packing) {
    const Operand& vector = d.operand(packing ? 1 : 0);
    const size_t parts = vector.elements.size();
    const uint32_t bytes = bytes_of(type);
    if (parts != 2 && parts != 4) {
        d.fail("a vector move takes 2 or 4 parts");
    }
    const uint32_t part_bytes = bytes / static_cast<uint32_t>(parts);
    if (part_bytes < 2) {
        d.fail("parts of 8 bits are not supported");
    }
    const Type part_type = part_bytes == 2 ? Type::kB16 : Type::kB32;
    std::vector<Ref> refs;
    for (const Operand& element : vector.elements) {
        refs.push_back(packing ? d.src(element, part_type) : d.dest(element, part_bytes));
    }
    d.op.list = d.list(refs);
    d.op.list_size = static_cast<uint16_t>(parts);
    if (packing) {
        d.op.d = d.dest(d.operand(0), bytes);
    } else {
        d.op.a = d.src(d.operand(1), type);
    }
    if (bytes == 4) {
        d.op.run = packing ? pack<uint32_t, uint16_t> : unpack<uint32_t, uint16_t>;
    } else if (part_bytes == 4) {
        d.op.run = packing ? pack<uint64_t, uint32_t> : unpack<uint64_t, uint32_t>;
    } else {
        d.op.run = packing ? pack<uint64_t, uint16_t> : unpack<uint64_t, uint16_t>;
    }
}

void decode_mov(Decoder& d) {
    d.op.op_class = OpClass::kMove;
    const Type type = d.take_type();
    d.need_operands(2, 2);
    if (type == Type::kPred) {
        d.op.p = d.pred_dest(d.operand(0));
        if (d.operand(1).kind == Operand::kSpecial) {
            d.op.run = special_register_handler(d.operand(1).name, 0, &d.op.imm);
            return;
        }
        d.op.q = d.pred_src(d.operand(1));
        d.op.run = move_pred;
        return;
    }
    const bool packing = d.operand(1).kind == Operand::kVector;
    if (packing || d.operand(0).kind == Operand::kVector) {
        decode_vector_move(d, type, packing);
        return;
    }
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.code = static_cast<uint16_t>(bytes_of(type));
    d.op.dataflow = Dataflow::kCopy;
    d.op.run = move_handler(bytes_of(type));
}

template <class T>
Step select(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t choose = predicate(w, op.p);
    const T* a = source<T>(w, op.a);
    const T* b = source<T>(w, op.b);
    T result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        result[i] = ((choose >> i) & 1u) != 0 ? a[i] : b[i];
    }
    merge(destination<T>(w, op.d), result, mask);
    return Step::kNext;
}

void decode_selp(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const Type type = d.take_type();
    d.need_operands(4, 4);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    d.op.p = d.pred_src(d.operand(3));
    d.op.run = bytes_of(type) == 2   ? select<uint16_t>
               : bytes_of(type) == 4 ? select<uint32_t>
                                     : select<uint64_t>;
}

template <class T, class C>
Step slct(Warp& w, const Op& op, uint32_t mask) {
    return map3<T, T, T, C>(w, op, mask, [](T a, T b, C c) { return c >= C{0} ? a : b; });
}

void decode_slct(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    d.take("ftz");
    const Type type = d.take_type();
    const Type chooser = d.take_type();
    d.need_operands(4, 4);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), type);
    d.op.c = d.src(d.operand(3), chooser);
    const bool real = chooser == Type::kF32;
    switch (bytes_of(type)) {
        case 2:
            d.op.run = real ? slct<uint16_t, float> : slct<uint16_t, int32_t>;
            break;
        case 4:
            d.op.run = real ? slct<uint32_t, float> : slct<uint32_t, int32_t>;
            break;
        default:
            d.op.run = real ? slct<uint64_t, float> : slct<uint64_t, int32_t>;
            break;
    }
}

// --- address spaces ---

uint64_t to_generic(Space space, uint64_t address, const uint8_t* params) {
    switch (space) {
        case Space::kSharedCta:
        case Space::kSharedCluster:
            return kSharedWindow + static_cast<uint32_t>(address);
        case Space::kLocal:
            return kLocalWindow + address;
        case Space::kParam:
            return address + reinterpret_cast<uint64_t>(params);
        default:
            return address;
    }
}

uint64_t from_generic(Space space, uint64_t address, const uint8_t* params) {
    switch (space) {
        case Space::kSharedCta:
        case Space::kSharedCluster:
            return address - kSharedWindow;
        case Space::kLocal:
            return address - kLocalWindow;
        case Space::kParam:
            return address - reinterpret_cast<uint64_t>(params);
        default:
            return address;
    }
}

Step cvta(Warp& w, const Op& op, uint32_t mask);
Step isspacep(Warp& w, const Op& op, uint32_t mask);

void decode_cvta(Decoder& d) {
    d.op.op_class = OpClass::kMove;
    d.op.code2 = d.take("to");
    d.op.space = d.take_space();
    const Type type = d.take_type();
    if (bytes_of(type) != 8 || d.op.space == Space::kGeneric) {
        d.fail("only cvta{.to}.space.u64 is supported");
    }
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 8);
    d.op.a = d.src(d.operand(1), type);
    d.op.run = cvta;
}

void decode_isspacep(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    d.op.space = d.take_space();
    d.need_operands(2, 2);
    d.op.p = d.pred_dest(d.operand(0));
    d.op.a = d.src(d.operand(1), Type::kB64);
    d.op.run = isspacep;
}

// mapa: the same shared address in the CTA of another rank.
template <class T, bool kGenericAddress>
Step mapa(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t ranks = static_cast<uint32_t>(w.cta->cluster->ctas.size());
    const T* a = source<T>(w, op.a);
    const uint32_t* rank = source<uint32_t>(w, op.b);
    T* d = destination<T>(w, op.d);
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        if (rank[i] >= ranks) {
            throw SimError(ErrorKind::kOutOfBounds,
                           format("mapa: rank %u of a cluster of %u CTAs", rank[i], ranks), op.line);
        }
        const uint32_t offset = static_cast<uint32_t>(a[i]) & ((1u << kRankShift) - 1);
        const uint64_t mapped = offset | (uint64_t{rank[i]} << kRankShift);
        d[i] = static_cast<T>(kGenericAddress ? kSharedWindow + mapped : mapped);
    }
    return Step::kNext;
}

Step getctarank(Warp& w, const Op& op, uint32_t mask) {
    const auto rank = [](uint64_t address) { return static_cast<uint32_t>(address) >> kRankShift; };
    return op.code == 8 ? map1<uint32_t, uint64_t>(w, op, mask, rank)
                        : map1<uint32_t, uint32_t>(w, op, mask, [](uint32_t a) { return a >> kRankShift; });
}

void decode_mapa(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    const bool shared = d.take_space() == Space::kSharedCluster;
    const Type type = d.take_type();
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), bytes_of(type));
    d.op.a = d.src(d.operand(1), type);
    d.op.b = d.src(d.operand(2), Type::kU32);
    if (bytes_of(type) == 4) {
        if (!shared) {
            d.fail("a generic address has 64 bits");
        }
        d.op.run = mapa<uint32_t, false>;
    } else {
        d.op.run = shared ? mapa<uint64_t, false> : mapa<uint64_t, true>;
    }
}

void decode_getctarank(Decoder& d) {
    d.op.op_class = OpClass::kAlu;
    d.take_space();
    const Type type = d.take_type();
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), type);
    d.op.code = static_cast<uint16_t>(bytes_of(type));
    d.op.run = getctarank;
}

Step cvta(Warp& w, const Op& op, uint32_t mask) {
    const uint8_t* params = w.cta->cluster->launch->params.data();
    const bool to = op.code2 != 0;
    return map1<uint64_t, uint64_t>(w, op, mask, [&](uint64_t a) {
        return to ? from_generic(op.space, a, params) : to_generic(op.space, a, params);
    });
}

Step isspacep(Warp& w, const Op& op, uint32_t mask) {
    const uint64_t* a = source<uint64_t>(w, op.a);
    const ParamBytes& params = w.cta->cluster->launch->params;
    const uint64_t param_base = reinterpret_cast<uint64_t>(params.data());
    uint32_t result = 0;
    for (int i = 0; i < kLanes; ++i) {
        const bool shared = a[i] >= kSharedWindow && a[i] < kLocalWindow;
        const bool own = shared && (static_cast<uint32_t>(a[i]) >> kRankShift) == w.cta->rank;
        const bool local = a[i] >= kLocalWindow;
        const bool param = a[i] >= param_base && a[i] < param_base + params.size();
        const bool is = op.space == Space::kSharedCta       ? own
                        : op.space == Space::kSharedCluster ? shared
                        : op.space == Space::kLocal         ? local
                        : op.space == Space::kParam         ? param
                                                            : !shared && !local;
        result |= static_cast<uint32_t>(is) << i;
    }
    set_predicate(w, op.p, result, mask);
    return Step::kNext;
}

}  // namespace

void register_moves(DecodeTable& table) {
    table["mov"] = decode_mov;
    table["selp"] = decode_selp;
    table["slct"] = decode_slct;
    table["cvta"] = decode_cvta;
    table["isspacep"] = decode_isspacep;
    table["mapa"] = decode_mapa;
    table["getctarank"] = decode_getctarank;
}

}  // namespace sim
