// The simulator's own 128-byte tensor map, and the geometry of the boxes it describes.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder.h"

namespace sim {

struct TensorMap {
    uint64_t magic;
    uint64_t base;
    uint64_t strides[4];  // bytes; of dimension 1 and up
    uint32_t last[5];     // extent - 1
    uint16_t box[5];
    uint8_t element_strides[5];
    uint8_t rank;
    uint8_t element_bytes;
    uint8_t type;     // CUtensorMapDataType
    uint8_t swizzle;  // span in 16-byte units: 0, 2, 4, 8
    uint8_t nan_fill;
    uint8_t padding[128 - 8 - 8 - 32 - 20 - 10 - 5 - 5];
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");
constexpr uint64_t kTensorMapMagic = 0x3870616d6d697338ull;

// One run of the innermost dimension: where it lies in the box and in global memory.
struct BoxRow {
    uint32_t box_offset;  // bytes from the box's start, before the swizzle
    uint64_t global;      // address of the row's first element in the box
    bool inside;          // the outer coordinates are within the tensor
    int64_t first;        // innermost coordinate of the row's start
};

struct BoxShape {
    uint32_t inner = 0;  // elements of a row
    uint32_t row_bytes = 0;
    uint32_t rows = 0;
    uint32_t bytes = 0;
};

const TensorMap& tensor_map_at(const uint8_t* pointer, uint32_t dimensions, int line);
BoxShape box_shape(const TensorMap& map);
std::vector<BoxRow> box_rows(const TensorMap& map, const int32_t* coordinates);
// The data type as reductions know it.
Type reduction_type(const TensorMap& map, int line);

// Where byte `offset` of an unswizzled box at shared address `address` really lies.
inline uint32_t swizzle_address(uint32_t address, uint32_t span_units) {
    switch (span_units) {
        case 8:
            return address ^ ((address >> 3) & 0x70);
        case 4:
            return address ^ ((address >> 3) & 0x30);
        case 2:
            return address ^ ((address >> 3) & 0x10);
        default:
            return address;
    }
}

}  // namespace sim
