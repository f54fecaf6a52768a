// cuTensorMapEncodeTiled, with the driver's own rules, into the simulator's format.
#include <cstring>

#include "driver_types.h"
#include "tensor_map.h"
#include "tensor_map_rules.h"

namespace {

using namespace sim::driver;

int refuse(const std::string& message) {
    set_last_error("[invalid-value] cuTensorMapEncodeTiled: " + message);
    return kInvalidValue;
}

int unsupported(const std::string& message) {
    set_last_error("[unsupported] cuTensorMapEncodeTiled: " + message);
    return kNotSupported;
}

sim::TensorMap encode(const sim::TiledArguments& m) {
    sim::TensorMap map;
    std::memset(&map, 0, sizeof map);
    map.magic = sim::kTensorMapMagic;
    map.base = reinterpret_cast<uint64_t>(m.address);
    map.rank = static_cast<uint8_t>(m.rank);
    map.type = static_cast<uint8_t>(m.type);
    map.element_bytes = static_cast<uint8_t>(sim::tensor_element_bytes(m.type));
    map.nan_fill = m.fill != 0;
    static const uint8_t spans[] = {0, 2, 4, 8};
    map.swizzle = spans[m.swizzle];
    for (uint32_t i = 0; i < m.rank; ++i) {
        map.last[i] = static_cast<uint32_t>(m.dims[i] - 1);
        map.box[i] = static_cast<uint16_t>(m.box[i]);
        map.element_strides[i] = static_cast<uint8_t>(i == 0 ? 1 : m.element_strides[i]);
        if (i > 0) {
            map.strides[i - 1] = m.strides[i - 1];
        }
    }
    return map;
}

}  // namespace

SIM_EXPORT int cuTensorMapEncodeTiled(void* out, int type, uint32_t rank, void* base, const uint64_t* dims,
                                      const uint64_t* strides, const uint32_t* box,
                                      const uint32_t* element_strides, int interleave, int swizzle,
                                      int l2_promotion, int fill) {
    const sim::TiledArguments arguments{out,          static_cast<uint32_t>(type),
                                        rank,         base,
                                        dims,         strides,
                                        box,          element_strides,
                                        interleave,   swizzle,
                                        l2_promotion, fill};
    const std::string broken = sim::broken_rule(arguments);
    if (!broken.empty()) {
        return refuse(broken);
    }
    if (interleave != 0 || swizzle > 3 || arguments.type >= sim::kTensorMap16U4Align8) {
        return unsupported(
            sim::format("data type %d, interleave %d, swizzle mode %d: interleaved layouts, packed types and "
                        "swizzles of larger atoms are not modelled",
                        type, interleave, swizzle));
    }
    const sim::TensorMap map = encode(arguments);
    const sim::BoxShape shape = sim::box_shape(map);
    const uint32_t span = map.swizzle * 16u;
    if (span != 0 && shape.row_bytes < span && shape.rows > 1) {
        return unsupported(sim::format("an inner box of %u bytes under a swizzle of %u is not modelled",
                                       shape.row_bytes, span));
    }
    std::memcpy(out, &map, sizeof map);
    return kSuccess;
}

SIM_EXPORT int cuTensorMapReplaceAddress(void* out, void* base) {
    sim::TensorMap map;
    std::memcpy(&map, out, sizeof map);
    if (map.magic != sim::kTensorMapMagic || reinterpret_cast<uint64_t>(base) % 16 != 0) {
        return refuse("no tensor map, or an address that is not aligned to 16 bytes");
    }
    map.base = reinterpret_cast<uint64_t>(base);
    std::memcpy(out, &map, sizeof map);
    return kSuccess;
}
