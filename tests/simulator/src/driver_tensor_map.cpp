// cuTensorMapEncodeTiled, with the driver's own rules, into the simulator's format.
#include <cstring>

#include "driver_types.h"
#include "tensor_map.h"

namespace {

using namespace sim::driver;

const uint8_t kElementBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

int refuse(const std::string& message) {
    set_last_error("[invalid-value] cuTensorMapEncodeTiled: " + message);
    return kInvalidValue;
}

int encode(sim::TensorMap& map, uint32_t type, uint32_t rank, uint64_t base, const uint64_t* dims,
           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
           int swizzle, int fill) {
    if (type >= sizeof kElementBytes) {
        return refuse(sim::format("data type %u is not modelled", type));
    }
    if (rank < 1 || rank > 5) {
        return refuse(sim::format("rank %u is not in 1..5", rank));
    }
    if (interleave != 0) {
        set_last_error("[unsupported] cuTensorMapEncodeTiled: interleaved layouts are not modelled");
        return kNotSupported;
    }
    if (swizzle < 0 || swizzle > 3) {
        return refuse(sim::format("swizzle mode %d is not modelled", swizzle));
    }
    if (base % 16 != 0) {
        return refuse(sim::format("the global address 0x%llx is not aligned to 16 bytes",
                                  static_cast<unsigned long long>(base)));
    }
    map.magic = sim::kTensorMapMagic;
    map.base = base;
    map.rank = static_cast<uint8_t>(rank);
    map.type = static_cast<uint8_t>(type);
    map.element_bytes = kElementBytes[type];
    map.nan_fill = fill != 0;
    static const uint8_t spans[] = {0, 2, 4, 8};
    map.swizzle = spans[swizzle];
    for (uint32_t i = 0; i < rank; ++i) {
        if (dims[i] == 0 || dims[i] > (uint64_t{1} << 32)) {
            return refuse(
                sim::format("dimension %u: an extent of %llu", i, static_cast<unsigned long long>(dims[i])));
        }
        if (box[i] == 0 || box[i] > 256) {
            return refuse(sim::format("dimension %u: a box of %u elements is not in 1..256", i, box[i]));
        }
        if (element_strides[i] == 0 || element_strides[i] > 8) {
            return refuse(
                sim::format("dimension %u: an element stride of %u is not in 1..8", i, element_strides[i]));
        }
        if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= (uint64_t{1} << 40))) {
            return refuse(sim::format("dimension %u: a stride of %llu bytes is no multiple of 16 below 2^40",
                                      i, static_cast<unsigned long long>(strides[i - 1])));
        }
        map.last[i] = static_cast<uint32_t>(dims[i] - 1);
        map.box[i] = static_cast<uint16_t>(box[i]);
        map.element_strides[i] = static_cast<uint8_t>(element_strides[i]);
        if (i > 0) {
            map.strides[i - 1] = strides[i - 1];
        }
    }
    const sim::BoxShape shape = sim::box_shape(map);
    if (shape.row_bytes % 16 != 0) {
        return refuse(
            sim::format("the box's inner dimension has %u bytes, no multiple of 16", shape.row_bytes));
    }
    const uint32_t span = map.swizzle * 16u;
    if (span != 0 && shape.row_bytes > span) {
        return refuse(sim::format("the box's inner dimension has %u bytes, more than the swizzle's %u",
                                  shape.row_bytes, span));
    }
    if (span != 0 && shape.row_bytes < span && shape.rows > 1) {
        set_last_error(sim::format(
            "[unsupported] cuTensorMapEncodeTiled: an inner box of %u bytes under a swizzle of %u is "
            "not modelled",
            shape.row_bytes, span));
        return kNotSupported;
    }
    return kSuccess;
}

}  // namespace

SIM_EXPORT int cuTensorMapEncodeTiled(void* out, int type, uint32_t rank, void* base, const uint64_t* dims,
                                      const uint64_t* strides, const uint32_t* box,
                                      const uint32_t* element_strides, int interleave, int swizzle, int,
                                      int fill) {
    if (reinterpret_cast<uint64_t>(out) % 64 != 0) {
        return refuse("the map itself must be aligned to 64 bytes");
    }
    sim::TensorMap map;
    std::memset(&map, 0, sizeof map);
    const int result = encode(map, static_cast<uint32_t>(type), rank, reinterpret_cast<uint64_t>(base), dims,
                              strides, box, element_strides, interleave, swizzle, fill);
    if (result == kSuccess) {
        std::memcpy(out, &map, sizeof map);
    }
    return result;
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
