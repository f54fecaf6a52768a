#include "float_formats.h"

#include <cmath>
#include <limits>

namespace sim {
namespace {

double round_integer(double x, Rounding rounding, bool negative) {
    switch (rounding) {
        case Rounding::kNearestEven:
            return std::nearbyint(x);
        case Rounding::kZero:
            return std::trunc(x);
        case Rounding::kDown:
            return negative ? std::ceil(x) : std::floor(x);
        case Rounding::kUp:
            return negative ? std::floor(x) : std::ceil(x);
        case Rounding::kNearestAway:
            return std::floor(x + 0.5);
    }
    return x;
}

uint32_t nan_code(const FloatFormat& format) {
    return (uint32_t{1} << (format.exponent_bits + format.mantissa_bits)) - 1;
}

uint32_t largest_code(const FloatFormat& format) {
    const uint32_t all = nan_code(format);
    return format.has_infinity ? all - (uint32_t{1} << format.mantissa_bits) : all - 1;
}

}  // namespace

double decode_float(uint32_t code, const FloatFormat& format) {
    const int bias = (1 << (format.exponent_bits - 1)) - 1;
    const int all_ones = (1 << format.exponent_bits) - 1;
    const uint32_t mantissa = code & ((1u << format.mantissa_bits) - 1);
    const int exponent = static_cast<int>(code >> format.mantissa_bits) & all_ones;
    const bool negative = ((code >> (format.exponent_bits + format.mantissa_bits)) & 1) != 0;
    double value;
    if (exponent == all_ones && format.has_infinity) {
        value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
    } else if (!format.has_infinity && (code & nan_code(format)) == nan_code(format)) {
        value = std::numeric_limits<double>::quiet_NaN();
    } else if (exponent == 0) {
        value = std::ldexp(mantissa, 1 - bias - format.mantissa_bits);
    } else {
        value = std::ldexp(mantissa + (1u << format.mantissa_bits), exponent - bias - format.mantissa_bits);
    }
    return negative ? -value : value;
}

uint32_t encode_float(double value, const FloatFormat& format, Rounding rounding, bool saturate) {
    if (std::isnan(value)) {
        return nan_code(format);
    }
    const bool negative = std::signbit(value);
    const uint32_t sign = negative ? uint32_t{1} << (format.exponent_bits + format.mantissa_bits) : 0;
    const uint32_t largest = largest_code(format);
    const uint32_t too_large = saturate ? largest : format.has_infinity ? largest + 1 : nan_code(format);
    const double magnitude = std::fabs(value);
    if (std::isinf(magnitude)) {
        return sign | too_large;
    }
    if (magnitude == 0) {
        return sign;
    }
    const int bias = (1 << (format.exponent_bits - 1)) - 1;
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
    const double units =
        round_integer(std::ldexp(magnitude, format.mantissa_bits - exponent), rounding, negative);
    const double rounded = std::ldexp(units, exponent - format.mantissa_bits);
    if (rounded > decode_float(largest, format)) {
        const bool towards_zero = rounding == Rounding::kZero || (rounding == Rounding::kDown && !negative) ||
                                  (rounding == Rounding::kUp && negative);
        return sign | (towards_zero ? largest : too_large);
    }
    if (rounded < std::ldexp(1.0, 1 - bias)) {
        return sign | static_cast<uint32_t>(units);  // subnormal: counts of the smallest unit
    }
    std::frexp(rounded, &exponent);
    exponent -= 1;
    const uint32_t mantissa = static_cast<uint32_t>(std::ldexp(rounded, format.mantissa_bits - exponent)) -
                              (1u << format.mantissa_bits);
    return sign | (static_cast<uint32_t>(exponent + bias) << format.mantissa_bits) | mantissa;
}

// The sum in double; when it is inexact its last bit is made odd, so that a second rounding to a
// format of at most half the bits is the correct one.
double add_to_odd(double x, double y) {
    const double sum = x + y;
    if (!std::isfinite(sum)) {
        return sum;
    }
    const double virtual_y = sum - x;
    const double error = (x - (sum - virtual_y)) + (y - virtual_y);
    uint64_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    if (error == 0 || (bits & 1) != 0) {
        return sum;
    }
    const bool away = (error > 0) == (sum > 0);
    bits += away ? 1 : uint64_t(-1);
    double odd;
    __builtin_memcpy(&odd, &bits, sizeof odd);
    return odd;
}

namespace {
struct Table {
    float values[256];
    explicit Table(const FloatFormat& format) {
        for (uint32_t i = 0; i < 256; ++i) {
            values[i] = static_cast<float>(decode_float(i, format));
        }
    }
};
}  // namespace

const float* e4m3_table() {
    static const Table table(kFormatE4m3);
    return table.values;
}

const float* e5m2_table() {
    static const Table table(kFormatE5m2);
    return table.values;
}

}  // namespace sim
