// From accumulators of 64 rows to 16-bit rows in global memory.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/quad.cuh"
#include "../attention/softmax.cuh"
#include "params.h"

#include <cute/tensor_impl.hpp>

namespace flash8 {

// A quad holds a row: lane q has columns 8 i + 2 q and 8 i + 2 q + 1. Four neighbouring column groups are
// transposed within the quad, so that lane q stores all eight columns of group 4 g + q: 16 bytes. Of a row
// that is not `inside` nothing is stored; one that is not `used` is zero. columns: how many the tensor has
// from `row` on.
template <class Element, int kColumns, class Accumulator>
__device__ __forceinline__ void store_row(uint16_t* row, bool inside, bool used, Accumulator const& x, int r,
                                          float factor, int columns) {
    int const lane = threadIdx.x % 4;
    constexpr int kEights = kColumns / 8;
#pragma unroll
    for (int first = 0; first < kEights; first += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int const at = 4 * (first + i) + 2 * r;
            bool const exists = first + i < kEights && used;
            words[i] = exists ? pack<Element>(x(at) * factor, x(at + 1) * factor) : 0;
        }
        transpose_quad(words, lane);
        int const column = 8 * (first + lane);
        if (inside && column < min(columns, kColumns)) {
            *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

__device__ __forceinline__ uint16_t* row_of(TensorRef const& tensor, int batch, int64_t row, int head) {
    return static_cast<uint16_t*>(tensor.ptr) + batch * tensor.batch_stride + row * tensor.row_stride +
           head * tensor.head_stride;
}

}  // namespace flash8
