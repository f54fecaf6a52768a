// ld and st of every space, type and vector length.
#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "launch.h"
#include "memory_decode.h"

namespace sim {
namespace {

// M: the type in memory; R: the register, as wide or wider.
template <class M, class R>
void load_element(Warp& w, Ref to, uint8_t* const* pointers, int element, uint32_t mask) {
    R* d = destination<R>(w, to);
    for (int i = 0; i < kLanes; ++i) {
        if (in_mask(mask, i)) {
            M value;
            std::memcpy(&value, pointers[i] + static_cast<size_t>(element) * sizeof(M), sizeof value);
            d[i] = static_cast<R>(value);
        }
    }
}

template <class M, class R>
void store_element(Warp& w, Ref from, uint8_t* const* pointers, int element, uint32_t mask) {
    const R* s = source<R>(w, from);
    for (int i = 0; i < kLanes; ++i) {
        if (in_mask(mask, i)) {
            const M value = static_cast<M>(s[i]);
            std::memcpy(pointers[i] + static_cast<size_t>(element) * sizeof(M), &value, sizeof value);
        }
    }
}

bool is_shared(Space space) {
    return space == Space::kSharedCta || space == Space::kSharedCluster;
}

void count_shared(Warp& w, const Op& op, uint8_t* const* pointers, uint32_t bytes) {
    if (is_shared(op.space) || op.space == Space::kGeneric) {
        count_wavefronts(w, op, pointers, kLanes, bytes);
    }
}

template <class M, class R>
Step load(Warp& w, const Op& op, uint32_t mask) {
    uint8_t* pointers[kLanes];
    resolve_lanes(w, op, mask, static_cast<uint32_t>(sizeof(M)) * op.list_size, AccessKind::kRead, pointers);
    for (int e = 0; e < op.list_size; ++e) {
        load_element<M, R>(w, w.program->lists[op.list + static_cast<uint32_t>(e)], pointers, e, mask);
    }
    if (op.space != Space::kParam) {
        count_shared(w, op, pointers, static_cast<uint32_t>(sizeof(M)) * op.list_size);
        count_bytes(*w.cta->cluster, is_shared(op.space) ? BytePath::kSharedLoad : BytePath::kGlobalLoad,
                    sizeof(M) * op.list_size * static_cast<uint64_t>(__builtin_popcount(mask)));
    }
    return Step::kNext;
}

template <class M, class R>
Step store(Warp& w, const Op& op, uint32_t mask) {
    uint8_t* pointers[kLanes];
    resolve_lanes(w, op, mask, static_cast<uint32_t>(sizeof(M)) * op.list_size, AccessKind::kWrite, pointers);
    for (int e = 0; e < op.list_size; ++e) {
        store_element<M, R>(w, w.program->lists[op.list + static_cast<uint32_t>(e)], pointers, e, mask);
    }
    count_shared(w, op, pointers, static_cast<uint32_t>(sizeof(M)) * op.list_size);
    count_bytes(*w.cta->cluster, is_shared(op.space) ? BytePath::kSharedStore : BytePath::kGlobalStore,
                sizeof(M) * op.list_size * static_cast<uint64_t>(__builtin_popcount(mask)));
    ++w.cta->cluster->progress;
    return Step::kNext;
}

template <class M>
Handler load_into(uint32_t register_bytes) {
    if constexpr (sizeof(M) <= 2) {
        if (register_bytes == 2) {
            return load<M, uint16_t>;
        }
    }
    if constexpr (sizeof(M) <= 4) {
        if (register_bytes == 4) {
            return load<M, uint32_t>;
        }
    }
    return register_bytes == 8 ? load<M, uint64_t> : nullptr;
}

template <class M>
Handler store_from(uint32_t register_bytes) {
    if constexpr (sizeof(M) <= 2) {
        if (register_bytes == 2) {
            return store<M, uint16_t>;
        }
    }
    if constexpr (sizeof(M) <= 4) {
        if (register_bytes == 4) {
            return store<M, uint32_t>;
        }
    }
    return register_bytes == 8 ? store<M, uint64_t> : nullptr;
}

Handler load_handler(Type type, uint32_t register_bytes) {
    switch (type) {
        case Type::kS8:
            return load_into<int8_t>(register_bytes);
        case Type::kB8:
        case Type::kU8:
            return load_into<uint8_t>(register_bytes);
        case Type::kS16:
            return load_into<int16_t>(register_bytes);
        case Type::kS32:
            return load_into<int32_t>(register_bytes);
        default:
            break;
    }
    switch (bytes_of(type)) {
        case 2:
            return load_into<uint16_t>(register_bytes);
        case 4:
            return load_into<uint32_t>(register_bytes);
        case 8:
            return load_into<uint64_t>(register_bytes);
        default:
            return nullptr;
    }
}

Handler store_handler(Type type, uint32_t register_bytes) {
    switch (bytes_of(type)) {
        case 1:
            return store_from<uint8_t>(register_bytes);
        case 2:
            return store_from<uint16_t>(register_bytes);
        case 4:
            return store_from<uint32_t>(register_bytes);
        case 8:
            return store_from<uint64_t>(register_bytes);
        default:
            return nullptr;
    }
}

OpClass class_of(Space space, bool is_load) {
    if (is_shared(space)) {
        return is_load ? OpClass::kLoadShared : OpClass::kStoreShared;
    }
    if (space == Space::kGlobal || space == Space::kGeneric) {
        return is_load ? OpClass::kLoadGlobal : OpClass::kStoreGlobal;
    }
    return OpClass::kLoadOther;
}

uint32_t decode_elements(Decoder& d, const Operand& value, Type type, bool is_load) {
    std::vector<Operand> elements =
        value.kind == Operand::kVector ? value.elements : std::vector<Operand>{value};
    std::vector<Ref> refs;
    uint32_t width = 0;
    for (const Operand& element : elements) {
        refs.push_back(is_load ? d.dest(element, std::max(bytes_of(type), 2u), true)
                               : d.src(element, type, true));
        width = std::max(width, d.width_of(element));
    }
    for (const Operand& element : elements) {
        const uint32_t own = d.width_of(element);
        if (own != 0 && own != width) {
            d.fail("the registers of the vector differ in width");
        }
    }
    d.op.list = d.list(refs);
    d.op.list_size = static_cast<uint16_t>(refs.size());
    return width == 0 ? std::max(bytes_of(type), 2u) : width;
}

void decode_access(Decoder& d) {
    const bool is_load = d.in().opcode != "st";
    take_memory_order(d, kWeak);
    d.op.space = d.take_space();
    const bool hinted = take_cache_hints(d);
    const std::string vector = d.take_any({"v2", "v4", "v8"}, "");
    const Type type = d.take_type();
    d.need_operands(hinted ? 3 : 2, hinted ? 3 : 2);
    d.op.op_class = class_of(d.op.space, is_load);
    d.op.dataflow = Dataflow::kRequire;
    const Operand& value = d.operand(is_load ? 0 : 1);
    const uint32_t width = decode_elements(d, value, type, is_load);
    d.op.code = static_cast<uint16_t>(bytes_of(type));  // in memory, and of a register
    d.op.code2 = static_cast<uint16_t>(width);
    const size_t expected = vector.empty() ? 1 : static_cast<size_t>(vector[1] - '0');
    if (d.op.list_size != expected || (value.kind == Operand::kVector) == vector.empty()) {
        d.fail("the operand is no vector of the stated length");
    }
    bool wide = false;
    d.op.a = d.address(d.operand(is_load ? 1 : 0), &wide);
    d.op.target2 = wide;
    d.op.run = is_load ? load_handler(type, width) : store_handler(type, width);
}

}  // namespace

void take_memory_order(Decoder& d, Level otherwise) {
    const std::string order =
        d.take_any({"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio", "weak"}, "");
    const std::string scope = d.take_any({"cta", "cluster", "gpu", "sys"}, "");
    const Level level = scope == "cta" ? kCtaLevel : scope == "cluster" ? kClusterLevel : kGpuLevel;
    const bool strong = !order.empty() && order != "weak";
    d.op.level = strong || !scope.empty() ? level : otherwise;
    d.op.memory_order = static_cast<uint8_t>((order == "acquire" || order == "acq_rel" ? kAcquires : 0) |
                                             (order == "release" || order == "acq_rel" ? kReleases : 0));
}

bool take_cache_hints(Decoder& d) {
    d.take_any({"ca", "cg", "cs", "lu", "cv", "wb", "wt"}, "");
    d.take("nc");
    std::string rest;
    bool policy = false;
    while (d.take_prefix("L1::", &rest) || d.take_prefix("L2::", &rest)) {
        policy = policy || rest == "cache_hint";
    }
    return policy;
}

void register_memory(DecodeTable& table) {
    table["ld"] = decode_access;
    table["ldu"] = decode_access;
    table["st"] = decode_access;
}

}  // namespace sim
