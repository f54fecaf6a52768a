// Rounding of accumulators to the 16-bit types, two at a time.

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

}  // namespace flash8
