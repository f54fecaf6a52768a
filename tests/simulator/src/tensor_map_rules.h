// What cuda.h asks of the arguments of cuTensorMapEncodeTiled. A header alone, so that any driver that stands
// in for the real one can use it.
#pragma once

#include <cstdint>
#include <string>

namespace sim {

enum TensorMapType : uint32_t {
    kTensorMapF16 = 6,
    kTensorMapTf32Ftz = 12,
    kTensorMap16U4Align8 = 13,
    kTensorMap16U4Align16 = 14,
    kTensorMap16U6Align16 = 15
};

struct TiledArguments {
    const void* map;
    uint32_t type, rank;
    const void* address;
    const uint64_t* dims;
    const uint64_t* strides;  // bytes; of dimension 1 and up
    const uint32_t* box;
    const uint32_t* element_strides;
    int interleave, swizzle, l2_promotion, fill;
};

// Bytes of an element, 0 for the packed types of 4 and 6 bits.
inline uint32_t tensor_element_bytes(uint32_t type) {
    constexpr uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return type < sizeof bytes ? bytes[type] : 0;
}

// Interleaving of 32 bytes and the packed types whose values lie apart ask for 32 where others ask for 16.
inline uint32_t tensor_alignment(const TiledArguments& m) {
    return m.interleave == 2 || m.type == kTensorMap16U4Align16 || m.type == kTensorMap16U6Align16 ? 32 : 16;
}

inline std::string broken_enum(const TiledArguments& m) {
    const auto outside = [](const char* what, int value, int most) {
        return value >= 0 && value <= most ? std::string()
                                           : what + (" " + std::to_string(value)) + " is none of the enum";
    };
    std::string text = outside("data type", static_cast<int>(m.type), kTensorMap16U6Align16);
    text = text.empty() ? outside("interleave", m.interleave, 2) : text;
    text = text.empty() ? outside("swizzle mode", m.swizzle, 6) : text;
    text = text.empty() ? outside("L2 promotion", m.l2_promotion, 3) : text;
    text = text.empty() ? outside("out-of-bounds fill", m.fill, 1) : text;
    if (!text.empty()) {
        return text;
    }
    if (m.interleave == 2 && m.swizzle != 1) {
        return "an interleave of 32 bytes needs the swizzle of 32 bytes";
    }
    if (m.fill == 1 && (m.type < kTensorMapF16 || m.type > kTensorMapTf32Ftz)) {
        return "the NaN fill is for floating-point types only";
    }
    return "";
}

// The strides that cuda.h describes begin with the size of a row and none is smaller; in which order they
// grow is left open, for drivers take tensors whose dimensions are permuted. A dimension of extent 1
// may have 0, as CUTLASS gives it.
inline std::string broken_tensor(const TiledArguments& m) {
    if (m.rank < 1 || m.rank > 5 || (m.interleave != 0 && m.rank < 3)) {
        return "rank " + std::to_string(m.rank) + " is not in " + (m.interleave != 0 ? "3" : "1") + "..5";
    }
    const uint64_t unit = tensor_alignment(m);
    if (m.address == nullptr || reinterpret_cast<uintptr_t>(m.address) % unit != 0) {
        return "the global address is null or not aligned to " + std::to_string(unit) + " bytes";
    }
    for (uint32_t i = 0; i < m.rank; ++i) {
        if (m.dims[i] == 0 || m.dims[i] > uint64_t{1} << 32) {
            return "dimension " + std::to_string(i) + ": an extent of " + std::to_string(m.dims[i]) +
                   " is not in 1..2^32";
        }
    }
    const uint64_t row = m.dims[0] * tensor_element_bytes(m.type);
    for (uint32_t i = 1; i < m.rank; ++i) {
        const uint64_t stride = m.strides[i - 1];
        const std::string what =
            "dimension " + std::to_string(i) + ": a stride of " + std::to_string(stride) + " bytes ";
        if (stride % unit != 0 || stride >= uint64_t{1} << 40) {
            return what + "is no multiple of " + std::to_string(unit) + " below 2^40";
        }
        const bool steps = stride != 0 || m.dims[i] > 1;
        if (stride < row && steps) {
            return what + "is smaller than a row of " + std::to_string(row);
        }
    }
    return "";
}

// `elementStrides` counts beyond dimension 0 only: cuda.h ignores its first value, but asks for 1..8.
inline std::string broken_box(const TiledArguments& m) {
    for (uint32_t i = 0; i < m.rank; ++i) {
        const std::string where = "dimension " + std::to_string(i) + ": ";
        if (m.box[i] == 0 || m.box[i] > 256) {
            return where + "a box of " + std::to_string(m.box[i]) + " elements is not in 1..256";
        }
        if (m.element_strides[i] == 0 || m.element_strides[i] > 8) {
            return where + "an element stride of " + std::to_string(m.element_strides[i]) + " is not in 1..8";
        }
    }
    if (m.interleave != 0) {
        return "";
    }
    const uint32_t inner = m.box[0] * tensor_element_bytes(m.type);
    const std::string what = "the box's inner dimension has " + std::to_string(inner) + " bytes, ";
    if (inner % 16 != 0) {
        return what + "no multiple of 16";
    }
    const uint32_t span = m.swizzle == 0 ? 0 : m.swizzle >= 3 ? 128 : 16u << m.swizzle;
    return span != 0 && inner > span ? what + "more than the swizzle's " + std::to_string(span) : "";
}

// The first rule that the arguments break, in words; empty when they keep all.
inline std::string broken_rule(const TiledArguments& m) {
    if (m.map == nullptr || reinterpret_cast<uintptr_t>(m.map) % 64 != 0) {
        return "the map itself must be aligned to 64 bytes";
    }
    if (m.dims == nullptr || m.box == nullptr || m.element_strides == nullptr ||
        (m.rank > 1 && m.strides == nullptr)) {
        return "an array is missing";
    }
    std::string text = broken_enum(m);
    text = text.empty() ? broken_tensor(m) : text;
    return text.empty() ? broken_box(m) : text;
}

}  // namespace sim
