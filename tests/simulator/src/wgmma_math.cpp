// The arithmetic of one warp's 16 rows. Lanes are the vector dimension: register 4 * octet + 2 * half
// + parity of lane l holds row l / 4 + 8 * half, column 8 * octet + 2 * (l % 4) + parity.
//
// As the hardware does it: within one wgmma all products and C are aligned to the largest exponent E
// among them and truncated to multiples of 2^(E - F); the sum is exact; the result is rounded toward
// zero to 23 (16-bit operands, F = 25) or 13 (8-bit operands, F = 13) mantissa bits.
#include <cmath>
#include <cstring>

#include "float_formats.h"
#include "lanes.h"
#include "wgmma.h"

namespace sim {
namespace {

constexpr int kZeroExponent = -126;

int exponent_of(float value) {
    const int field = static_cast<int>((as_bits(value) >> 23) & 0xff);
    return field == 0 ? kZeroExponent : field - 127;
}

// Exponents of operands count from the format's own smallest normal: subnormals do not normalize.
int operand_exponent(float value, int smallest) {
    const int exponent = exponent_of(value);
    return value != 0.0f && exponent < smallest ? smallest : exponent;
}

int smallest_exponent(Type type) {
    switch (type) {
        case Type::kF16:
        case Type::kE5m2:
            return -14;
        case Type::kE4m3:
            return -6;
        default:
            return -126;
    }
}

struct Format {
    int fraction;  // F
    bool f16_result;
    bool short_result;  // 13 mantissa bits
};

// One element, whatever the values: the definition, in double.
float one_element(const float* a, size_t a_step, const float* b, size_t b_step, int k_count, float c,
                  int smallest_a, int smallest_b, const Format& format) {
    double plain = c;
    int top = exponent_of(c);
    for (int k = 0; k < k_count; ++k) {
        const float x = a[static_cast<size_t>(k) * a_step];
        const float y = b[static_cast<size_t>(k) * b_step];
        plain += static_cast<double>(x) * y;
        top = std::max(top, operand_exponent(x, smallest_a) + operand_exponent(y, smallest_b));
    }
    if (std::isnan(plain)) {
        return as_float(kCanonicalNan);
    }
    if (std::isinf(plain)) {
        return static_cast<float>(plain);
    }
    double sum = std::trunc(std::ldexp(static_cast<double>(c), format.fraction - top));
    for (int k = 0; k < k_count; ++k) {
        const double product =
            static_cast<double>(a[static_cast<size_t>(k) * a_step]) * b[static_cast<size_t>(k) * b_step];
        sum += std::trunc(std::ldexp(product, format.fraction - top));
    }
    const double exact = std::ldexp(sum, top - format.fraction);
    if (format.f16_result) {
        return half_to_float(
            static_cast<uint16_t>(encode_float(exact, kFormatF16, Rounding::kNearestEven, false)));
    }
    float result = static_cast<float>(exact);
    uint32_t bits = as_bits(result);
    if (std::isfinite(result) && std::fabs(static_cast<double>(result)) > std::fabs(exact)) {
        --bits;
    }
    return as_float(format.short_result ? bits & ~0x3ffu : bits);
}

struct Exponents {
    std::vector<int32_t> a, b;
};

void fill_exponents(const std::vector<float>& values, int smallest, std::vector<int32_t>& exponents) {
    exponents.resize(values.size());
    const float* from = values.data();
    int32_t* to = exponents.data();
    for (size_t i = 0; i < values.size(); ++i) {
        const int32_t field = static_cast<int32_t>((as_bits(from[i]) >> 23) & 0xff) - 127;
        const int32_t bounded = field < smallest ? smallest : field;
        to[i] = from[i] == 0.0f ? kZeroExponent : bounded;
    }
}

using Floats = float __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(128)));

template <class V, class T>
V load_vector(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

Integers larger(Integers a, Integers b) {
    return a > b ? a : b;
}

Integers exponent_field(Floats value) {
    Integers bits;
    std::memcpy(&bits, &value, sizeof bits);
    return ((bits >> 23) & 0xff) - 127;
}

Floats as_floats(Integers bits) {
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Toward zero, to 23 or 13 mantissa bits.
void round_sums(Integers sum0, Integers sum1, Floats scale, const Format& format, float* c) {
    const Doubles exact = (__builtin_convertvector(sum0, Doubles) + __builtin_convertvector(sum1, Doubles)) /
                          __builtin_convertvector(scale, Doubles);
    for (int l = 0; l < 16; ++l) {
        const float rounded = static_cast<float>(exact[l]);
        const bool away = std::fabs(static_cast<double>(rounded)) > std::fabs(exact[l]);
        const uint32_t bits = as_bits(rounded) - (away ? 1u : 0u);
        c[l] = as_float(format.short_result ? bits & ~0x3ffu : bits);
    }
}

// Sum of truncated products for 16 lanes; false when an exponent is out of the fast path's range.
bool exact_lanes(const float* a, const int32_t* ea, const float* b, const int32_t* eb, int k_count, float* c,
                 const Format& format) {
    const Floats old = load_vector<Floats>(c);
    Integers top = larger(exponent_field(old), Integers{} + kZeroExponent);
    for (int k = 0; k < k_count; ++k) {
        top = larger(top, load_vector<Integers>(ea + k * 32) + load_vector<Integers>(eb + k * 32));
    }
    const Integers outside = (top < -90) | (top > 90);
    int any = 0;
    for (int l = 0; l < 16; ++l) {
        any |= outside[l];
    }
    if (any != 0) {
        return false;
    }
    const Floats scale = as_floats((format.fraction + 127 - top) << 23);
    Integers sum0 = __builtin_convertvector(old * scale, Integers), sum1{};
    for (int k = 0; k < k_count; k += 2) {
        const Floats product0 = load_vector<Floats>(a + k * 32) * load_vector<Floats>(b + k * 32);
        const Floats product1 = load_vector<Floats>(a + k * 32 + 32) * load_vector<Floats>(b + k * 32 + 32);
        sum0 += __builtin_convertvector(product0 * scale, Integers);
        sum1 += __builtin_convertvector(product1 * scale, Integers);
    }
    round_sums(sum0, sum1, scale, format, c);
    return true;
}

void plain_lanes(const float* a, const float* b, int k_count, float* c) {
    Floats low = load_vector<Floats>(c), high = load_vector<Floats>(c + 16);
    for (int k = 0; k < k_count; ++k) {
        const Floats y = load_vector<Floats>(b + k * 32);
        low += load_vector<Floats>(a + k * 32) * y;
        high += load_vector<Floats>(a + k * 32 + 16) * y;
    }
    std::memcpy(c, &low, sizeof low);
    std::memcpy(c + 16, &high, sizeof high);
}

// The accumulator registers as floats and back: f16 results hold two columns each.
void read_accumulator(const Warp& w, const WgmmaShape& shape, int index, bool scale_d, float* c) {
    if (!scale_d) {
        std::fill(c, c + 32, 0.0f);
        return;
    }
    const uint32_t* lists = w.program->lists.data() + shape.accumulators;
    if (shape.d == Type::kF32) {
        std::memcpy(c, source<float>(w, lists[index]), 128);
        return;
    }
    const uint32_t* packed = source<uint32_t>(w, lists[index / 2]);
    for (int l = 0; l < 32; ++l) {
        c[l] = half_to_float(static_cast<uint16_t>(packed[l] >> (index % 2 * 16)));
    }
}

void write_accumulator(Warp& w, const WgmmaShape& shape, int index, const float* c) {
    const uint32_t* lists = w.program->lists.data() + shape.accumulators;
    if (shape.d == Type::kF32) {
        std::memcpy(destination<float>(w, lists[index]), c, 128);
        return;
    }
    uint32_t* packed = destination<uint32_t>(w, lists[index / 2]);
    const int shift = index % 2 * 16;
    for (int l = 0; l < 32; ++l) {
        packed[l] = (packed[l] & ~(0xffffu << shift)) | static_cast<uint32_t>(float_to_half(c[l])) << shift;
    }
}

}  // namespace

void multiply(Warp& w, const WgmmaShape& shape, bool scale_d, const std::vector<float>& a,
              const std::vector<float>& b, bool exact) {
    const bool eight_bit = bytes_of(shape.a) == 1;
    const Format format{eight_bit ? 13 : 25, shape.d == Type::kF16, eight_bit && shape.d == Type::kF32};
    const int smallest_a = smallest_exponent(shape.a), smallest_b = smallest_exponent(shape.b);
    static thread_local Exponents exponents;
    if (exact) {
        fill_exponents(a, smallest_a, exponents.a);
        fill_exponents(b, smallest_b, exponents.b);
    }
    const int registers = shape.n / 2;
    for (int r = 0; r < registers; ++r) {
        const int octet = r / 4, half = r / 2 % 2, parity = r % 2;
        const size_t a_at = static_cast<size_t>(half * shape.k) * 32;
        const size_t b_at = (static_cast<size_t>(octet * shape.k) * 2 + static_cast<size_t>(parity)) * 16;
        alignas(64) float c[32];
        read_accumulator(w, shape, r, scale_d, c);
        if (!exact) {
            plain_lanes(a.data() + a_at, b.data() + b_at, shape.k, c);
            if (shape.d == Type::kF16) {
                for (float& value : c) {
                    value = half_to_float(float_to_half(value));
                }
            }
        } else {
            for (int at = 0; at < 32; at += 16) {
                const float* a_lanes = a.data() + a_at + at;
                const float* b_lanes = b.data() + b_at;
                if (!format.f16_result && exact_lanes(a_lanes, exponents.a.data() + a_at + at, b_lanes,
                                                      exponents.b.data() + b_at, shape.k, c + at, format)) {
                    continue;
                }
                for (int l = 0; l < 16; ++l) {
                    c[at + l] = one_element(a_lanes + l, 32, b_lanes + l, 32, shape.k, c[at + l], smallest_a,
                                            smallest_b, format);
                }
            }
        }
        write_accumulator(w, shape, r, c);
    }
}

}  // namespace sim
