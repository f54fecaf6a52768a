// 2^x on the FMA units instead of the special function unit, for some of a tile's exponentials.

#pragma once

#include "../arch/ptx.cuh"

#include <cstdint>

namespace flash8 {

// A polynomial for 2^x on [0, 1) whose relative error has equal ripples. It is to drown in the rounding of P:
// 1.7e-3 by degree 2 in e4m3's, 7.5e-5 by degree 3 in bf16's, 2.7e-6 by degree 4 in fp16's.
template <int kDegree>
__device__ __forceinline__ float exp2_of_fraction(float x) {
    static_assert(kDegree >= 2 && kDegree <= 4);
    if constexpr (kDegree == 2) {
        return (0.337189435f * x + 0.657636276f) * x + 1.00172476f;
    } else if constexpr (kDegree == 3) {
        return ((0.0780245215f * x + 0.226067156f) * x + 0.695833564f) * x + 0.999925196f;
    } else {
        return (((0.0135341678f * x + 0.0520114601f) * x + 0.241442755f) * x + 0.693003833f) * x +
               1.00000262f;
    }
}

// x is at most 126; below -126 the result is about 2^-126. Adding kShift leaves floor(x) in the low bits of
// the sum, which become the exponent of a power of two. NaN stays NaN, through the maximum and the product.
template <int kDegree>
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    constexpr uint32_t kOne = 0x3f800000;
    float const clamped = ptx::max_or_nan(x, -126.0f);
    float const shifted = __fadd_rd(clamped, kShift);
    float const power = __uint_as_float((__float_as_uint(shifted) << 23) + kOne);
    return exp2_of_fraction<kDegree>(clamped - (shifted - kShift)) * power;
}

// How the exponentials of a row are made: every kEvery-th by a polynomial, none if that is 0. A polynomial
// is never 0, so it is not for keys that a mask hides.
template <int kEvery, int kDegree>
struct Exponentials {
    using Exact = Exponentials<0, kDegree>;

    // Of the i-th exponential of a thread's row; i is known where this is unrolled.
    __device__ __forceinline__ static float exp2(int i, float x) {
        bool const polynomial = kEvery > 0 && (i + 1) % (kEvery > 0 ? kEvery : 1) == 0;
        return polynomial ? exp2_polynomial<kDegree>(x) : ptx::exp2(x);
    }
};

}  // namespace flash8
