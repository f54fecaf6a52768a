// 2^x without the special function unit, for e4m3 P: its error, 1.7e-3, drowns in e4m3's rounding.

#pragma once

#include <cstdint>

namespace flash8 {

// x is at most 126; below -126 the result is about 2^-126. Adding kShift leaves floor(x) in the low bits of
// the sum. What remains of x goes through a polynomial of degree 2 with equal ripples on [0, 1), and the
// integer is added to its exponent.
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    float const clamped = fmaxf(x, -126.0f);
    float const shifted = __fadd_rd(clamped, kShift);
    float const fraction = clamped - (shifted - kShift);
    float const mantissa = (0.337189435f * fraction + 0.657636276f) * fraction + 1.00172476f;
    return __uint_as_float(__float_as_uint(mantissa) + (__float_as_uint(shifted) << 23));
}

}  // namespace flash8
