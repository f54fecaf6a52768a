// Neighbouring channels of a row: loads of 16 bytes, and the conversions to and from fp32.

#pragma once

#include <cstdint>

namespace flash8::quantize {

enum class Input { kFp16, kBf16, kFp32, kE4m3 };

constexpr int kGroup = 8;  // channels of one 16-byte load of a 16-bit type

template <Input kInput>
__device__ __forceinline__ float widen(uint32_t half_word) {
    if constexpr (kInput == Input::kBf16) {
        return __uint_as_float(half_word << 16);
    } else {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half_word)));
        return value;
    }
}

// Two elements as one word, `low` in the low half: to nearest even.
template <Input kInput>
__device__ __forceinline__ uint32_t narrow(float low, float high) {
    uint32_t word;
    if constexpr (kInput == Input::kBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

__device__ __forceinline__ void load_floats(float const* source, float (&values)[kGroup]) {
    float4 const low = reinterpret_cast<float4 const*>(source)[0];
    float4 const high = reinterpret_cast<float4 const*>(source)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

}  // namespace flash8::quantize
