// Arithmetic in the directed rounding modes. Built with -frounding-math: the host's mode is switched.
#include <cfenv>
#include <cmath>

#include "alu_families.h"
#include "lanes.h"

namespace sim {
namespace {

enum Operation : uint16_t { kAdd, kSub, kMul, kDiv, kFma, kSqrt, kRcp };

int host_mode(Rounding rounding) {
    switch (rounding) {
        case Rounding::kZero:
            return FE_TOWARDZERO;
        case Rounding::kDown:
            return FE_DOWNWARD;
        case Rounding::kUp:
            return FE_UPWARD;
        default:
            return FE_TONEAREST;
    }
}

class ScopedRounding {
  public:
    explicit ScopedRounding(int mode) : before_(std::fegetround()) { std::fesetround(mode); }
    ~ScopedRounding() { std::fesetround(before_); }

  private:
    int before_;
};

template <class T>
T compute(uint16_t operation, T a, T b, T c) {
    switch (operation) {
        case kAdd:
            return a + b;
        case kSub:
            return a - b;
        case kMul:
            return a * b;
        case kDiv:
            return a / b;
        case kFma:
            return std::fma(a, b, c);
        case kSqrt:
            return std::sqrt(a);
        default:
            return T{1} / a;
    }
}

template <class T>
T flushed(T value) {
    if constexpr (sizeof(T) == 4) {
        return flush(value);
    }
    return value;
}

template <class T>
Step directed(Warp& w, const Op& op, uint32_t mask) {
    const ScopedRounding scope(host_mode(static_cast<Rounding>(op.imm)));
    const bool ftz = (op.code2 & 1) != 0;
    const bool sat = (op.code2 & 2) != 0;
    const T* a = source<T>(w, op.a);
    const T* b = op.b == kNone ? a : source<T>(w, op.b);
    const T* c = op.c == kNone ? a : source<T>(w, op.c);
    T result[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const volatile T x = ftz ? flushed(a[i]) : a[i];
        const volatile T y = ftz ? flushed(b[i]) : b[i];
        const volatile T z = ftz ? flushed(c[i]) : c[i];
        const volatile T r = compute<T>(op.code, x, y, z);
        result[i] = ftz ? flushed<T>(r) : T(r);
        if (sat) {
            result[i] = result[i] > T{1} ? T{1} : result[i] > T{0} ? result[i] : T{0};
        }
    }
    merge(destination<T>(w, op.d), result, mask);
    return Step::kNext;
}

}  // namespace

void decode_directed(Decoder& d, Type type, Rounding rounding, bool ftz, bool sat) {
    const std::string& opcode = d.in().opcode;
    d.op.code = opcode == "add"    ? kAdd
                : opcode == "sub"  ? kSub
                : opcode == "mul"  ? kMul
                : opcode == "div"  ? kDiv
                : opcode == "sqrt" ? kSqrt
                : opcode == "rcp"  ? kRcp
                                   : kFma;
    d.op.code2 = static_cast<uint16_t>((ftz ? 1 : 0) | (sat ? 2 : 0));
    d.op.imm = static_cast<int64_t>(rounding);
    d.op.run = type == Type::kF32 ? directed<float> : directed<double>;
}

}  // namespace sim
