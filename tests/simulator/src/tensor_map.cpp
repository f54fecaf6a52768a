#include "tensor_map.h"

#include "errors.h"

namespace sim {

const TensorMap& tensor_map_at(const uint8_t* pointer, uint32_t dimensions, int line) {
    if (reinterpret_cast<uint64_t>(pointer) % 64 != 0) {
        throw SimError(ErrorKind::kMisaligned, "a tensor map must be aligned to 64 bytes", line);
    }
    const TensorMap& map = *reinterpret_cast<const TensorMap*>(pointer);
    if (map.magic != kTensorMapMagic) {
        throw SimError(ErrorKind::kInvalidValue,
                       "there is no tensor map at this address (cuTensorMapEncodeTiled makes one)", line);
    }
    if (map.rank != dimensions) {
        throw SimError(ErrorKind::kInvalidValue,
                       format("the tensor map has %u dimensions, the instruction %u", map.rank, dimensions),
                       line);
    }
    return map;
}

namespace {

uint32_t taken(const TensorMap& map, uint32_t dimension) {
    const uint32_t stride = map.element_strides[dimension];
    return (map.box[dimension] + stride - 1) / stride;
}

}  // namespace

BoxShape box_shape(const TensorMap& map) {
    BoxShape shape;
    shape.inner = taken(map, 0);
    shape.row_bytes = shape.inner * map.element_bytes;
    shape.rows = 1;
    for (uint32_t i = 1; i < map.rank; ++i) {
        shape.rows *= taken(map, i);
    }
    shape.bytes = shape.row_bytes * shape.rows;
    return shape;
}

std::vector<BoxRow> box_rows(const TensorMap& map, const int32_t* coordinates) {
    const BoxShape shape = box_shape(map);
    std::vector<BoxRow> rows;
    rows.reserve(shape.rows);
    uint32_t at[5] = {};
    for (uint32_t r = 0; r < shape.rows; ++r) {
        BoxRow row{r * shape.row_bytes, 0, true, coordinates[0]};
        int64_t offset = row.first * map.element_bytes;
        for (uint32_t i = 1; i < map.rank; ++i) {
            const int64_t coordinate = int64_t{coordinates[i]} + int64_t{at[i]} * map.element_strides[i];
            row.inside = row.inside && coordinate >= 0 && coordinate <= int64_t{map.last[i]};
            offset += coordinate * static_cast<int64_t>(map.strides[i - 1]);
        }
        row.global = map.base + static_cast<uint64_t>(offset);
        rows.push_back(row);
        for (uint32_t i = 1; i < map.rank && ++at[i] == taken(map, i); ++i) {
            at[i] = 0;
        }
    }
    return rows;
}

Type reduction_type(const TensorMap& map, int line) {
    static const Type types[] = {Type::kU8,  Type::kU16, Type::kU32, Type::kS32, Type::kU64,
                                 Type::kS64, Type::kF16, Type::kF32, Type::kF64, Type::kBf16,
                                 Type::kF32, Type::kF32, Type::kF32};
    if (map.type >= sizeof types / sizeof types[0] || map.type < 2) {
        throw SimError(ErrorKind::kUnsupported, format("no reduction on tensor data type %u", map.type),
                       line);
    }
    return types[map.type];
}

}  // namespace sim
