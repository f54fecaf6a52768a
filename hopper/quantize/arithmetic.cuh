// fp32 arithmetic as the CPU does it: rounded to nearest at every step, never contracted, subnormals kept.
// The kernels are compiled with fast math, which would contract and flush. And the conversions of a
// quantizer.

#pragma once

#include <cstdint>

namespace flash8::quantize {

__device__ __forceinline__ float add(float a, float b) {
    float c;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float subtract(float a, float b) {
    float c;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float multiply(float a, float b) {
    float c;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float divide(float a, float b) {
    float c;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float reciprocal(float a) {
    float b;
    asm("rcp.rn.f32 %0, %1;" : "=f"(b) : "f"(a));
    return b;
}

__device__ __forceinline__ float square_root(float a) {
    float b;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(b) : "f"(a));
    return b;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// The larger of a and |b|; a where b is NaN.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
    float c;
    asm("{\n.reg .f32 magnitude;\nabs.f32 magnitude, %2;\nmax.f32 %0, %1, magnitude;\n}"
        : "=f"(c)
        : "f"(a), "f"(b));
    return c;
}

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;

// |x| as an integer with the order of |x|; 0 for infinities and NaN, which do not count.
__device__ __forceinline__ uint32_t finite_magnitude(float x) {
    uint32_t const bits = __float_as_uint(x) & kMagnitude;
    return bits < kInfinity ? bits : 0;
}

// Two elements as one 16-bit word, `low` in the low byte: to nearest even, saturated, NaN kept.
template <bool kE5m2>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint16_t word;
    if constexpr (kE5m2) {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(word) : "f"(high), "f"(low));
    }
    return word;
}

template <bool kE5m2>
__device__ __forceinline__ uint32_t pack(float a, float b, float c, float d) {
    return pack<kE5m2>(a, b) | pack<kE5m2>(c, d) << 16;
}

// amax / the largest value of the type; 1 where nothing counts; at least 2^-126, so that the inverse is
// finite.
template <bool kE5m2>
__device__ __forceinline__ float descale_of(uint32_t amax_bits) {
    constexpr float kLargest = kE5m2 ? 57344.0f : 448.0f;
    constexpr float kSmallestDescale = 1.17549435e-38f;
    float const descale = divide(__uint_as_float(amax_bits), kLargest);
    return amax_bits == 0 ? 1.0f : (descale >= kSmallestDescale ? descale : kSmallestDescale);
}

}  // namespace flash8::quantize
