// TMA descriptors of tiled tensors.

#pragma once

#include <cstdint>
#include <vector>

#include "driver/driver.h"
#include "kernel_info.h"

namespace flash8 {

// A tensor in global memory, innermost dimension first. strides[i] is that of dims[i + 1] in bytes; the
// innermost dimension is contiguous. Rows may not overlap, so that no stride is below their size: not even
// that of a dimension of one, to which nothing is ever added.
struct TiledTensor {
    ElementType element_type;
    std::uint64_t address;
    std::vector<std::int64_t> dims;
    std::vector<std::int64_t> strides;
};

int element_bytes(ElementType type);

// The stride in bytes. Throws std::invalid_argument if TMA cannot have it.
std::int64_t stride_in_bytes(std::int64_t elements, ElementType type);

// Gives dimensions of size one the stride of the next inner dimension, or the size of a row: frameworks give
// them any stride.
void settle_strides(TiledTensor& tensor);

// box.box counts elements of every dimension that one TMA instruction moves; elements out of bounds read as
// zero and are not written. Throws std::invalid_argument that names what TMA cannot do.
TensorMap encode_tensor_map(const Driver& driver, const TiledTensor& tensor, const TmaBox& box);

}  // namespace flash8
