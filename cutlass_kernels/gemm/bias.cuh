// The bias of a product.

#pragma once

#include "gemm_params.h"

#include <cutlass/numeric_types.h>

namespace flash8::gemm {

// Of a column, whatever its type is. Without branches: a tile has many.
__device__ __forceinline__ float bias_of(GemmParams const& params, int column) {
    bool const wide = params.bias_type == ElementType::kFloat32;
    char const* const at = static_cast<char const*>(params.bias) + int64_t{column} * (wide ? 4 : 2);
    uint32_t const word =
        wide ? *reinterpret_cast<uint32_t const*>(at) : *reinterpret_cast<uint16_t const*>(at);
    cutlass::half_t const half = cutlass::half_t::bitcast(static_cast<uint16_t>(word));
    float const as_half = static_cast<float>(half);
    float const as_other = __uint_as_float(wide ? word : word << 16);
    return params.bias_type == ElementType::kFloat16 ? as_half : as_other;
}

}  // namespace flash8::gemm
