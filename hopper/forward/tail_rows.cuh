// Rows of packed O and LSE behind the last sequence: nobody's, and written all the same.

#pragma once

#include "../params.h"

namespace flash8 {

// O = 0 and LSE = -inf there. By all consumer warps of the grid, a row of one head each; `warp` counts them
// from 0 to `warps`.
__device__ inline void clear_tail_rows(ForwardParams const& params, int warp, int warps) {
    if (params.sequences.cu_seqlens_q == nullptr) {
        return;
    }
    int const begin = params.sequences.cu_seqlens_q[params.sequences.batch];
    int64_t const count = (params.sequences.total_q - begin) * params.heads_q;
    for (int64_t i = warp; i < count; i += warps) {
        int64_t const row = begin + i / params.heads_q;
        int const head = static_cast<int>(i % params.heads_q);
        // O has two bytes an element, and its rows are multiples of 16 bytes.
        uint16_t* const o =
            static_cast<uint16_t*>(params.o.ptr) + row * params.o.row_stride + head * params.o.head_stride;
        for (int column = threadIdx.x % 32 * 8; column < params.head_dim_v; column += 32 * 8) {
            *reinterpret_cast<uint4*>(o + column) = make_uint4(0, 0, 0, 0);
        }
        if (threadIdx.x % 32 == 0 && params.lse.ptr != nullptr) {
            params.lse.ptr[head * params.lse.head_stride + row] = -INFINITY;
        }
    }
}

}  // namespace flash8
