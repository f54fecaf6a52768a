// TMA descriptors of tiled tensors.

#pragma once

#include <cstdint>
#include <vector>

#include "driver.h"
#include "params.h"

namespace flash8 {

// A tensor in global memory, innermost dimension first. strides[i] is that of dims[i + 1] in bytes; the
// innermost dimension is contiguous.
struct TiledTensor {
    ElementType element_type;
    std::uint64_t address;
    std::vector<std::int64_t> dims;
    std::vector<std::int64_t> strides;
};

int element_bytes(ElementType type);

// box.box counts elements of every dimension that one TMA instruction moves; elements out of bounds read as
// zero and are not written. Throws std::invalid_argument that names what TMA cannot do.
TensorMap encode_tensor_map(const Driver& driver, const TiledTensor& tensor, const TmaBox& box);

}  // namespace flash8
