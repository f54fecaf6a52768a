// Rounding of accumulators to the types of operands and outputs.

#pragma once

#include <cutlass/numeric_types.h>
#include <cstdint>
#include <type_traits>

namespace flash8 {

// Two floats as one register, `low` in the low half, rounded to nearest even.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<Element, cutlass::bfloat16_t>, "float16 or bfloat16");
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

// Four floats as one register of e4m3, x0 in the lowest byte, rounded to nearest even, saturated at 448.
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t word;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(word)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return word;
}

// Four e4m3 values of one register as floats, the lowest byte first.
__device__ __forceinline__ void unpack_e4m3(uint32_t word, float* values) {
    uint32_t halves[2];
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}\n"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(word));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        asm("{\n"
            ".reg .b16 low, high;\n"
            "mov.b32 {low, high}, %2;\n"
            "cvt.f32.f16 %0, low;\n"
            "cvt.f32.f16 %1, high;\n"
            "}\n"
            : "=f"(values[2 * i]), "=f"(values[2 * i + 1])
            : "r"(halves[i]));
    }
}

// The same as two registers of 16-bit elements, exactly; NaN stays NaN. To float16 by one instruction for two
// values, to bfloat16 by way of fp32.
template <class Element>
__device__ __forceinline__ void widen_e4m3(uint32_t word, uint32_t& low, uint32_t& high) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
        asm("{\n"
            ".reg .b16 low, high;\n"
            "mov.b32 {low, high}, %2;\n"
            "cvt.rn.f16x2.e4m3x2 %0, low;\n"
            "cvt.rn.f16x2.e4m3x2 %1, high;\n"
            "}\n"
            : "=r"(low), "=r"(high)
            : "r"(word));
    } else {
        float values[4];
        unpack_e4m3(word, values);
        low = pack<Element>(values[0], values[1]);
        high = pack<Element>(values[2], values[3]);
    }
}

}  // namespace flash8
