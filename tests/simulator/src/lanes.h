// Loops over the lanes of a warp, written so that the compiler turns them into vector code.
#pragma once

#include <cstdint>
#include <cstring>

#include "machine.h"

namespace sim {

inline bool in_mask(uint32_t mask, int lane) {
    return ((mask >> lane) & 1u) != 0;
}
inline int first_lane(uint32_t mask) {
    return __builtin_ctz(mask);
}

template <class T>
inline void merge(T* target, const T* values, uint32_t mask) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) {
        target[i] = ((mask >> i) & 1u) != 0 ? values[i] : target[i];
    }
}

template <class D, class A, class F>
inline Step map1(Warp& w, const Op& op, uint32_t mask, F f) {
    D* d = destination<D>(w, op.d);
    const A* a = source<A>(w, op.a);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            d[i] = f(a[i]);
        }
        return Step::kNext;
    }
    D result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        result[i] = f(a[i]);
    }
    merge(d, result, mask);
    return Step::kNext;
}

template <class D, class A, class B, class F>
inline Step map2(Warp& w, const Op& op, uint32_t mask, F f) {
    D* d = destination<D>(w, op.d);
    const A* a = source<A>(w, op.a);
    const B* b = source<B>(w, op.b);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            d[i] = f(a[i], b[i]);
        }
        return Step::kNext;
    }
    D result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        result[i] = f(a[i], b[i]);
    }
    merge(d, result, mask);
    return Step::kNext;
}

template <class D, class A, class B, class C, class F>
inline Step map3(Warp& w, const Op& op, uint32_t mask, F f) {
    D* d = destination<D>(w, op.d);
    const A* a = source<A>(w, op.a);
    const B* b = source<B>(w, op.b);
    const C* c = source<C>(w, op.c);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            d[i] = f(a[i], b[i], c[i]);
        }
        return Step::kNext;
    }
    D result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        result[i] = f(a[i], b[i], c[i]);
    }
    merge(d, result, mask);
    return Step::kNext;
}

// A condition over two sources, as a lane mask.
template <class T, class F>
inline uint32_t compare_lanes(const Warp& w, const Op& op, F f) {
    const T* a = source<T>(w, op.a);
    const T* b = source<T>(w, op.b);
    uint8_t bits[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        bits[i] = f(a[i], b[i]) ? 1 : 0;
    }
    uint32_t result = 0;
    for (int i = 0; i < kLanes; ++i) {
        result |= static_cast<uint32_t>(bits[i]) << i;
    }
    return result;
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double as_double(uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint64_t as_bits(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// .ftz: subnormal inputs and results become zeros of the same sign.
inline float flush(float value) {
    const uint32_t bits = as_bits(value);
    return as_float((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

constexpr uint32_t kCanonicalNan = 0x7fffffffu;

// Every NaN result of a floating-point instruction is the canonical one.
inline float canonical(float value) {
    return value != value ? as_float(kCanonicalNan) : value;
}

}  // namespace sim
