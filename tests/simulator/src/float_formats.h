// Narrow floating-point formats, bit by bit.
#pragma once

#include <cstdint>

namespace sim {

enum class Rounding { kNearestEven, kZero, kDown, kUp, kNearestAway };

struct FloatFormat {
    int exponent_bits;
    int mantissa_bits;
    bool has_infinity;  // false for e4m3, whose all-ones code is its only NaN
};
constexpr FloatFormat kFormatF16{5, 10, true};
constexpr FloatFormat kFormatBf16{8, 7, true};
constexpr FloatFormat kFormatE4m3{4, 3, false};
constexpr FloatFormat kFormatE5m2{5, 2, true};
constexpr FloatFormat kFormatTf32{8, 10, true};

// The value of a code, exactly.
double decode_float(uint32_t code, const FloatFormat& format);

// Rounds to the format. Too large: infinity (or the largest, by rounding mode), with `saturate` the
// largest finite value. NaN: the format's canonical one.
uint32_t encode_float(double value, const FloatFormat& format, Rounding rounding, bool saturate);

// x + y and x * y + z correctly rounded to the format in one step.
double add_to_odd(double x, double y);

inline uint16_t float_to_bf16(float value);
inline float half_to_float(uint16_t code) {
    const uint32_t sign = static_cast<uint32_t>(code & 0x8000u) << 16;
    const uint32_t magnitude = code & 0x7fffu;
    // A subnormal half is a count of 2^-24.
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    uint32_t small_bits;
    __builtin_memcpy(&small_bits, &small, sizeof small_bits);
    uint32_t bits = (magnitude << 13) + (112u << 23);
    bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
    bits = magnitude < 0x0400u ? small_bits : bits;
    bits |= sign;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
inline float bf16_to_float(uint16_t code) {
    const uint32_t bits = static_cast<uint32_t>(code) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
const float* e4m3_table();  // 256 values
const float* e5m2_table();

// Branch-free, for loops over lanes: round to nearest even.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

inline uint16_t float_to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    float absolute;
    __builtin_memcpy(&absolute, &magnitude, sizeof absolute);
    const float shifted = absolute + 0.5f;  // the unit of its last place is that of a subnormal half
    uint32_t shifted_bits;
    __builtin_memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
    const uint32_t subnormal = shifted_bits - 0x3f000000u;
    uint32_t code = magnitude < 0x38800000u ? subnormal : normal;
    code = magnitude >= 0x477ff000u ? 0x7c00u : code;
    code = magnitude > 0x7f800000u ? 0x7fffu : sign | code;
    return static_cast<uint16_t>(code);
}

// cvt.rn.satfinite.e4m3x2.f32, one element.
inline uint8_t float_to_e4m3(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 24) & 0x80u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    float absolute;
    __builtin_memcpy(&absolute, &magnitude, sizeof absolute);
    const float shifted = absolute + 16384.0f;  // unit 2^-9, that of a subnormal e4m3
    uint32_t shifted_bits;
    __builtin_memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
    const uint32_t subnormal = shifted_bits - 0x46800000u;
    uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
    code = magnitude >= 0x43e00000u ? 0x7eu : code;
    code = sign | code;
    return static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : code);
}

}  // namespace sim
