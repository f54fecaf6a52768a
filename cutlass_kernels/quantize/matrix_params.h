// The one parameter of the kernel that makes operands of FP8 products, shared by host and device by the rules
// of hopper/params.h.
//
//     y     = x                                           kQuantizeMatrix
//     y     = h * (1 / sqrt(mean(h^2) + eps)) * weight    kQuantizeRmsNorm; h = x, or round(x + residual)
//     y     = x * sigmoid(x) * up                         kQuantizeSiluMul
//     scale = amax / 448                                  of a row, or of each 128 of its columns
//     data  = saturate(y * (1 / scale))                   in e4m3, columns filled up with zeros to 16
//
// y is fp32. Columns are contiguous; strides are between rows.

#pragma once

#include "params.h"

namespace flash8 {

struct QuantizeMatrixParams {
    const void* x;            // (rows, columns)
    const void* other;        // of x's type: up, or the residual; null: there is no residual
    void* sum;                // of x's type: h, where there is a residual
    const void* norm_weight;  // (columns), fp32 or x's type
    void* out;                // (rows, columns up to a multiple of 16)
    float* scale;             // (rows, ceil(columns / 128)), or (rows)

    std::int64_t x_stride;
    std::int64_t other_stride;
    std::int64_t sum_stride;
    std::int64_t out_stride;
    std::int64_t scale_stride;

    std::int32_t rows;
    std::int32_t columns;
    std::int32_t by_row;        // 1: a row has one scale
    std::int32_t row_threads;   // that share a row: a power of two, which fixes the order of the sum of h^2
    std::int32_t norm_is_fp32;  // the weight
    float norm_eps;
    std::int32_t vector_access;  // 1: rows and the weight are read and written by 16 bytes
    std::int32_t reserved;       // zero
};

static_assert(kIsPlain<QuantizeMatrixParams> && alignof(QuantizeMatrixParams) == 8);
static_assert(sizeof(QuantizeMatrixParams) <= 4096);

}  // namespace flash8
