// Exchanges and votes between the lanes of a warp.
#include "decoder.h"
#include "lanes.h"
#include "warp_sync.h"

namespace sim {
namespace {

uint32_t member_mask(const Warp& w, Ref ref, uint32_t mask) {
    return source<uint32_t>(w, ref)[first_lane(mask)];
}

void require_member(const Op& op, uint32_t members, uint32_t joint) {
    if ((joint & ~members) != 0) {
        throw SimError(ErrorKind::kDivergence,
                       format("lanes 0x%08x execute a .sync instruction whose mask 0x%08x does not name them",
                              joint & ~members, members),
                       op.line);
    }
}

// Meets the named lanes; *joint gets those that take part.
bool gather(Warp& w, const Op& op, Ref mask_ref, uint32_t mask, uint32_t* joint) {
    const uint32_t members = member_mask(w, mask_ref, mask);
    if (!meet(w, op, members, joint)) {
        return false;
    }
    if (op.guard != kNone) {
        *joint &= predicate(w, op.guard);
    }
    require_member(op, members, *joint);
    return true;
}

enum Mode : uint16_t { kUp, kDown, kBfly, kIdx };

bool source_lane(uint16_t mode, int lane, uint32_t b, uint32_t c, int* from) {
    const int clamp = static_cast<int>(c & 0x1f);
    const int segment = static_cast<int>((c >> 8) & 0x1f);
    const int amount = static_cast<int>(b & 0x1f);
    const int max_lane = (lane & segment) | (clamp & ~segment);
    const int min_lane = lane & segment;
    int j = lane;
    bool in_range = false;
    switch (mode) {
        case kUp:
            j = lane - amount;
            in_range = j >= max_lane;
            break;
        case kDown:
            j = lane + amount;
            in_range = j <= max_lane;
            break;
        case kBfly:
            j = lane ^ amount;
            in_range = j <= max_lane;
            break;
        default:
            j = min_lane | (amount & ~segment);
            in_range = j <= max_lane;
            break;
    }
    *from = in_range ? j : lane;
    return in_range;
}

Step shfl(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    if (!gather(w, op, op.e, mask, &joint)) {
        return Step::kBlocked;
    }
    uint32_t values[kLanes];
    std::memcpy(values, source<uint32_t>(w, op.a), sizeof values);
    const uint32_t* b = source<uint32_t>(w, op.b);
    const uint32_t* c = source<uint32_t>(w, op.c);
    uint32_t result[kLanes];
    uint32_t valid = 0;
    for (int i = 0; i < kLanes; ++i) {
        int from = i;
        const bool in_range = source_lane(op.code, i, b[i], c[i], &from);
        if (in_mask(joint, i) && in_range && !in_mask(joint, from)) {
            throw SimError(ErrorKind::kDivergence,
                           format("shfl.sync: lane %d reads lane %d, which does not take part (mask 0x%08x)",
                                  i, from, joint),
                           op.line);
        }
        valid |= static_cast<uint32_t>(in_range) << i;
        result[i] = values[from];
    }
    merge(destination<uint32_t>(w, op.d), result, joint);
    if (op.p != kNone) {
        set_predicate(w, op.p, valid, joint);
    }
    return Step::kNext;
}

void decode_shfl(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.take_any({"sync"});
    const std::string mode = d.take_any({"up", "down", "bfly", "idx"});
    d.take_any({"b32"});
    d.need_operands(5, 5);
    d.op.d = d.dest(d.operand(0), 4);
    if (!d.operand(0).elements.empty()) {
        d.op.p = d.pred_dest(d.operand(0).elements[0]);
    }
    d.op.a = d.src(d.operand(1), Type::kB32);
    d.op.b = d.src(d.operand(2), Type::kB32);
    d.op.c = d.src(d.operand(3), Type::kB32);
    d.op.e = d.src(d.operand(4), Type::kB32);
    d.op.code = mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kBfly : kIdx;
    d.op.run = shfl;
}

enum Vote : uint16_t { kAll, kAny, kUni, kBallot };

Step vote(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    if (!gather(w, op, op.e, mask, &joint)) {
        return Step::kBlocked;
    }
    const uint32_t ballot = predicate(w, op.q) & joint;
    if (op.code == kBallot) {
        uint32_t values[kLanes];
        std::fill(values, values + kLanes, ballot);
        merge(destination<uint32_t>(w, op.d), values, joint);
        return Step::kNext;
    }
    const bool result = op.code == kAll   ? ballot == joint
                        : op.code == kAny ? ballot != 0
                                          : ballot == joint || ballot == 0;
    set_predicate(w, op.p, result ? kAllLanes : 0, joint);
    return Step::kNext;
}

void decode_vote(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.take_any({"sync"});
    const std::string mode = d.take_any({"all", "any", "uni", "ballot"});
    d.take_any({"pred", "b32"});
    d.need_operands(3, 3);
    d.op.code = mode == "all" ? kAll : mode == "any" ? kAny : mode == "uni" ? kUni : kBallot;
    if (d.op.code == kBallot) {
        d.op.d = d.dest(d.operand(0), 4);
    } else {
        d.op.p = d.pred_dest(d.operand(0));
    }
    d.op.q = d.pred_src(d.operand(1));
    d.op.e = d.src(d.operand(2), Type::kB32);
    d.op.run = vote;
}

template <class T>
Step match(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    if (!gather(w, op, op.e, mask, &joint)) {
        return Step::kBlocked;
    }
    const T* a = source<T>(w, op.a);
    uint32_t result[kLanes] = {};
    bool all_equal = true;
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; in_mask(joint, i) && j < kLanes; ++j) {
            if (in_mask(joint, j)) {
                result[i] |= static_cast<uint32_t>(a[i] == a[j]) << j;
                all_equal = all_equal && a[i] == a[j];
            }
        }
    }
    if (op.code != 0) {  // .all
        std::fill(result, result + kLanes, all_equal ? joint : 0);
        if (op.p != kNone) {
            set_predicate(w, op.p, all_equal ? kAllLanes : 0, joint);
        }
    }
    merge(destination<uint32_t>(w, op.d), result, joint);
    return Step::kNext;
}

void decode_match(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.op.code = d.take_any({"any", "all"}) == "all";
    d.take_any({"sync"});
    const Type type = d.take_type();
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), 4);
    if (!d.operand(0).elements.empty()) {
        d.op.p = d.pred_dest(d.operand(0).elements[0]);
    }
    d.op.a = d.src(d.operand(1), type);
    d.op.e = d.src(d.operand(2), Type::kB32);
    d.op.run = bytes_of(type) == 4 ? match<uint32_t> : match<uint64_t>;
}

enum Redux : uint16_t { kRAdd, kRMin, kRMax, kRAnd, kROr, kRXor };

Step redux(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    if (!gather(w, op, op.e, mask, &joint)) {
        return Step::kBlocked;
    }
    const uint32_t* a = source<uint32_t>(w, op.a);
    const bool is_signed_op = op.code2 != 0;
    const auto less = [&](uint32_t x, uint32_t y) {
        return is_signed_op ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
    };
    uint32_t total = a[first_lane(joint)];
    for (int i = first_lane(joint) + 1; i < kLanes; ++i) {
        if (!in_mask(joint, i)) {
            continue;
        }
        switch (op.code) {
            case kRAdd:
                total += a[i];
                break;
            case kRMin:
                total = less(a[i], total) ? a[i] : total;
                break;
            case kRMax:
                total = less(total, a[i]) ? a[i] : total;
                break;
            case kRAnd:
                total &= a[i];
                break;
            case kROr:
                total |= a[i];
                break;
            default:
                total ^= a[i];
                break;
        }
    }
    uint32_t values[kLanes];
    std::fill(values, values + kLanes, total);
    merge(destination<uint32_t>(w, op.d), values, joint);
    return Step::kNext;
}

void decode_redux(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.take_any({"sync"});
    const std::string name = d.take_any({"add", "min", "max", "and", "or", "xor"});
    const Type type = d.take_type();
    if (type == Type::kF32) {
        d.fail("redux.sync on .f32 needs sm_100a; the device is sm_90a");
    }
    const bool bitwise = name == "and" || name == "or" || name == "xor";
    if (bitwise ? type != Type::kB32 : type != Type::kU32 && type != Type::kS32) {
        d.fail("redux.sync takes .add, .min, .max on .u32, .s32 and .and, .or, .xor on .b32");
    }
    d.need_operands(3, 3);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), type);
    d.op.e = d.src(d.operand(2), Type::kB32);
    d.op.code = name == "add"   ? kRAdd
                : name == "min" ? kRMin
                : name == "max" ? kRMax
                : name == "and" ? kRAnd
                : name == "or"  ? kROr
                                : kRXor;
    d.op.code2 = is_signed(type);
    d.op.run = redux;
}

// The leader is the lowest lane: any choice is legal, but it must be the same each time.
Step elect(Warp& w, const Op& op, uint32_t mask) {
    uint32_t joint = 0;
    if (!gather(w, op, op.e, mask, &joint)) {
        return Step::kBlocked;
    }
    const int leader = first_lane(joint);
    uint32_t values[kLanes];
    std::fill(values, values + kLanes, static_cast<uint32_t>(leader));
    merge(destination<uint32_t>(w, op.d), values, joint);
    if (op.p != kNone) {
        set_predicate(w, op.p, uint32_t{1} << leader, joint);
    }
    return Step::kNext;
}

void decode_elect(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.take_any({"sync"});
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 4);
    if (!d.operand(0).elements.empty()) {
        d.op.p = d.pred_dest(d.operand(0).elements[0]);
    }
    d.op.e = d.src(d.operand(1), Type::kB32);
    d.op.run = elect;
}

Step activemask(Warp& w, const Op& op, uint32_t mask) {
    uint32_t values[kLanes];
    std::fill(values, values + kLanes, mask);
    merge(destination<uint32_t>(w, op.d), values, mask);
    return Step::kNext;
}

void decode_activemask(Decoder& d) {
    d.op.op_class = OpClass::kWarp;
    d.take_any({"b32"});
    d.need_operands(1, 1);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.run = activemask;
}

}  // namespace

void register_warp_ops(DecodeTable& table) {
    table["shfl"] = decode_shfl;
    table["vote"] = decode_vote;
    table["match"] = decode_match;
    table["redux"] = decode_redux;
    table["elect"] = decode_elect;
    table["activemask"] = decode_activemask;
}

}  // namespace sim
