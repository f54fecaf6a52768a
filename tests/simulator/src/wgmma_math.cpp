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
// Of infinity and NaN in an operand: no zero beside it brings it back into the fast path.
constexpr int kNonFiniteExponent = 1024;

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
    bool zero = c == 0.0f;
    for (int k = 0; k < k_count; ++k) {
        const float x = a[static_cast<size_t>(k) * a_step];
        const float y = b[static_cast<size_t>(k) * b_step];
        plain += static_cast<double>(x) * y;
        zero = zero && x * y == 0.0f;
        top = std::max(top, operand_exponent(x, smallest_a) + operand_exponent(y, smallest_b));
    }
    if (zero) {  // masked keys are common
        return 0.0f;
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

// As wide as the machine's registers: of wider vectors the compiler takes comparisons apart, lane by lane.
#if defined(__AVX512F__)
constexpr size_t kBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kBytes = 32;
#else
constexpr size_t kBytes = 16;
#endif
constexpr size_t kWidth = kBytes / sizeof(float);

using Floats = float __attribute__((vector_size(kBytes)));
using Integers = int32_t __attribute__((vector_size(kBytes)));
using Doubles = double __attribute__((vector_size(2 * kBytes)));
using Longs = int64_t __attribute__((vector_size(2 * kBytes)));

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

bool any_lane(Integers value) {
    using Four = int32_t __attribute__((vector_size(16)));
    Four parts[kBytes / 16];
    std::memcpy(parts, &value, sizeof value);
    Four four = parts[0];
    for (size_t i = 1; i < kBytes / 16; ++i) {
        four |= parts[i];
    }
    int64_t two[2];
    std::memcpy(two, &four, sizeof four);
    return (two[0] | two[1]) != 0;
}

Floats as_floats(Integers bits) {
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// (sum0 + sum1) / 2^shift toward zero to 23 or 13 mantissa bits. The sum is exact as a double; without the
// bits of its mantissa that a float has no room for, it is exact as a float.
Floats round_sums(Integers sum0, Integers sum1, Integers shift, const Format& format) {
    const Floats inverse = as_floats((127 - shift) << 23);
    const Doubles exact = (__builtin_convertvector(sum0, Doubles) + __builtin_convertvector(sum1, Doubles)) *
                          __builtin_convertvector(inverse, Doubles);
    const int dropped = format.short_result ? 52 - 13 : 52 - 23;
    Longs bits;
    std::memcpy(&bits, &exact, sizeof bits);
    bits &= Longs{} + ~((int64_t{1} << dropped) - 1);
    Doubles truncated;
    std::memcpy(&truncated, &bits, sizeof truncated);
    return __builtin_convertvector(truncated, Floats);
}

// Lanes that have a product other than zero, or C.
template <int k_count>
Integers nonzero_lanes(const float* a, const float* b, Floats c) {
    Integers found = c != Floats{};
    for (int k = 0; k < k_count; ++k) {
        found |= load_vector<Floats>(a + k * 32) * load_vector<Floats>(b + k * 32) != Floats{};
    }
    return found;
}

// Sum of truncated products for kWidth lanes; false when an exponent is out of the fast path's range.
template <int k_count>
bool exact_lanes(const float* a, const int32_t* ea, const float* b, const int32_t* eb, float* c,
                 const Format& format) {
    const Floats old = load_vector<Floats>(c);
    Integers top = larger(exponent_field(old), Integers{} + kZeroExponent);
#pragma GCC unroll 8
    for (int k = 0; k < k_count; ++k) {
        top = larger(top, load_vector<Integers>(ea + k * 32) + load_vector<Integers>(eb + k * 32));
    }
    const Integers outside = (top < -90) | (top > 90);
    if (any_lane(outside)) {
        if (any_lane(outside & nonzero_lanes<k_count>(a, b, old))) {
            return false;
        }
        top &= ~outside;  // masked keys are common
    }
    const Integers shift = format.fraction - top;
    const Floats scale = as_floats((shift + 127) << 23);
    Integers sum0 = __builtin_convertvector(old * scale, Integers), sum1{};
#pragma GCC unroll 8
    for (int k = 0; k < k_count; k += 2) {
        const Floats product0 = load_vector<Floats>(a + k * 32) * load_vector<Floats>(b + k * 32);
        const Floats product1 = load_vector<Floats>(a + k * 32 + 32) * load_vector<Floats>(b + k * 32 + 32);
        sum0 += __builtin_convertvector(product0 * scale, Integers);
        sum1 += __builtin_convertvector(product1 * scale, Integers);
    }
    const Floats rounded = round_sums(sum0, sum1, shift, format);
    std::memcpy(c, &rounded, sizeof rounded);
    return true;
}

void plain_lanes(const float* a, const float* b, int k_count, float* c) {
    constexpr size_t parts = 32 / kWidth;
    Floats sums[parts];
    std::memcpy(sums, c, sizeof sums);
    for (int k = 0; k < k_count; ++k) {
        const Floats y = load_vector<Floats>(b + k * 32);
        for (size_t part = 0; part < parts; ++part) {
            sums[part] += load_vector<Floats>(a + k * 32 + part * kWidth) * y;
        }
    }
    std::memcpy(c, sums, sizeof sums);
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

// 32 lanes of one accumulator register: the fast path where it holds, else the definition.
template <int k_count>
void exact_register(const WgmmaOperand& a, size_t a_at, const WgmmaOperand& b, size_t b_at,
                    const WgmmaShape& shape, const Format& format, float* c) {
    for (size_t at = 0; at < 32; at += kWidth) {
        const float* a_lanes = a.values.data() + a_at + at;
        const float* b_lanes = b.values.data() + b_at;
        if (!format.f16_result && exact_lanes<k_count>(a_lanes, a.exponents.data() + a_at + at, b_lanes,
                                                       b.exponents.data() + b_at, c + at, format)) {
            continue;
        }
        const int smallest_a = smallest_exponent(shape.a), smallest_b = smallest_exponent(shape.b);
        for (size_t l = 0; l < kWidth; ++l) {
            c[at + l] = one_element(a_lanes + l, 32, b_lanes + l, 32, k_count, c[at + l], smallest_a,
                                    smallest_b, format);
        }
    }
}

void plain_register(const WgmmaOperand& a, size_t a_at, const WgmmaOperand& b, size_t b_at,
                    const WgmmaShape& shape, float* c) {
    plain_lanes(a.values.data() + a_at, b.values.data() + b_at, shape.k, c);
    if (shape.d == Type::kF16) {
        for (int l = 0; l < 32; ++l) {
            c[l] = half_to_float(float_to_half(c[l]));
        }
    }
}

}  // namespace

void fill_exponents(WgmmaOperand& operand, Type type) {
    const int smallest = smallest_exponent(type);
    operand.exponents.resize(operand.values.size());
    const float* from = operand.values.data();
    int32_t* to = operand.exponents.data();
    for (size_t i = 0; i < operand.values.size(); ++i) {
        const int32_t field = static_cast<int32_t>((as_bits(from[i]) >> 23) & 0xff) - 127;
        const int32_t bounded = field < smallest ? smallest : field;
        to[i] = from[i] == 0.0f ? kZeroExponent : field == 128 ? kNonFiniteExponent : bounded;
    }
}

void multiply(Warp& w, const WgmmaShape& shape, bool scale_d, const WgmmaOperand& a, const WgmmaOperand& b,
              bool exact) {
    const bool eight_bit = bytes_of(shape.a) == 1;
    const Format format{eight_bit ? 13 : 25, shape.d == Type::kF16, eight_bit && shape.d == Type::kF32};
    const auto multiply_register = shape.k == 8    ? exact_register<8>
                                   : shape.k == 16 ? exact_register<16>
                                                   : exact_register<32>;
    const int registers = shape.n / 2;
    for (int r = 0; r < registers; ++r) {
        const int octet = r / 4, half = r / 2 % 2, parity = r % 2;
        const size_t a_at = static_cast<size_t>(half * shape.k) * 32;
        const size_t b_at = (static_cast<size_t>(octet * shape.k) * 2 + static_cast<size_t>(parity)) * 16;
        alignas(64) float c[32];
        read_accumulator(w, shape, r, scale_d, c);
        if (exact) {
            multiply_register(a, a_at, b, b_at, shape, format, c);
        } else {
            plain_register(a, a_at, b, b_at, shape, c);
        }
        write_accumulator(w, shape, r, c);
    }
}

}  // namespace sim
