// Matrix products of widths that CuTe declares only with all its extended shapes, which would cost every
// compilation seconds: 64 x 80 and 64 x 176 of 16-bit operands, 64 x 160 and 64 x 224 of e4m3 operands,
// K-major, both in shared memory. Scores of attention, and tiles of a GEMM.

#pragma once

#include <cutlass/numeric_types.h>
#include <cstdint>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace flash8 {

template <class Element, int kN>
struct SpeltOut {};

template <class Element, int kN>
inline constexpr bool kIsSpeltOut =
    std::is_same_v<Element, cutlass::float_e4m3_t> ? kN == 160 || kN == 224 : kN == 80 || kN == 176;

// The accumulator's registers as operands, and their names in the text of the instruction.
#define FLASH8_FLOATS_8(c, i)                                                                   \
    "+f"(c(i)), "+f"(c(i + 1)), "+f"(c(i + 2)), "+f"(c(i + 3)), "+f"(c(i + 4)), "+f"(c(i + 5)), \
        "+f"(c(i + 6)), "+f"(c(i + 7))
#define FLASH8_FLOATS_40(c)                                                                       \
    FLASH8_FLOATS_8(c, 0), FLASH8_FLOATS_8(c, 8), FLASH8_FLOATS_8(c, 16), FLASH8_FLOATS_8(c, 24), \
        FLASH8_FLOATS_8(c, 32)
#define FLASH8_FLOATS_80(c)                                                                      \
    FLASH8_FLOATS_40(c), FLASH8_FLOATS_8(c, 40), FLASH8_FLOATS_8(c, 48), FLASH8_FLOATS_8(c, 56), \
        FLASH8_FLOATS_8(c, 64), FLASH8_FLOATS_8(c, 72)
#define FLASH8_FLOATS_88(c) FLASH8_FLOATS_80(c), FLASH8_FLOATS_8(c, 80)
#define FLASH8_FLOATS_112(c) \
    FLASH8_FLOATS_88(c), FLASH8_FLOATS_8(c, 88), FLASH8_FLOATS_8(c, 96), FLASH8_FLOATS_8(c, 104)
#define FLASH8_NAMES_40                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, "         \
    "%8, %9, %10, %11, %12, %13, %14, %15, "   \
    "%16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH8_NAMES_80                          \
    FLASH8_NAMES_40                              \
    ", %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, "   \
    "%56, %57, %58, %59, %60, %61, %62, %63, "   \
    "%64, %65, %66, %67, %68, %69, %70, %71, "   \
    "%72, %73, %74, %75, %76, %77, %78, %79"
#define FLASH8_NAMES_88 FLASH8_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH8_NAMES_112                           \
    FLASH8_NAMES_88                                \
    ", %88, %89, %90, %91, %92, %93, %94, %95, "   \
    "%96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111"
// Transposed operands are for 16 bits only, and so are the instruction's words for it.
#define FLASH8_NEGATION "1, 1"
#define FLASH8_NEGATION_MAJOR "1, 1, 0, 0"

// `names` are the accumulator's registers, then come the descriptors and whether to accumulate.
#define FLASH8_WGMMA(shape, type, modifiers, names, a_name, b_name, accumulate_name, floats)            \
    asm volatile(                                                                                       \
        "{\n"                                                                                           \
        ".reg .pred accumulate;\n"                                                                      \
        "setp.ne.b32 accumulate, " accumulate_name                                                      \
        ", 0;\n"                                                                                        \
        "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a_name ", " b_name \
        ", accumulate, " modifiers                                                                      \
        ";\n"                                                                                           \
        "}\n"                                                                                           \
        : floats                                                                                        \
        : "l"(a), "l"(b), "r"(accumulate))

template <class Element, int kN, class Accumulator>
__device__ __forceinline__ void issue(uint64_t a, uint64_t b, Accumulator&& c, int accumulate) {
    constexpr bool kHalf = std::is_same_v<Element, cutlass::half_t>;
    static_assert(kIsSpeltOut<Element, kN>, "the shapes that are spelt out");
    if constexpr (kN == 160) {
        FLASH8_WGMMA("m64n160k32", "e4m3", FLASH8_NEGATION, FLASH8_NAMES_80, "%80", "%81", "%82",
                     FLASH8_FLOATS_80(c));
    } else if constexpr (kN == 224) {
        FLASH8_WGMMA("m64n224k32", "e4m3", FLASH8_NEGATION, FLASH8_NAMES_112, "%112", "%113", "%114",
                     FLASH8_FLOATS_112(c));
    } else if constexpr (kN == 80 && kHalf) {
        FLASH8_WGMMA("m64n80k16", "f16", FLASH8_NEGATION_MAJOR, FLASH8_NAMES_40, "%40", "%41", "%42",
                     FLASH8_FLOATS_40(c));
    } else if constexpr (kN == 80) {
        FLASH8_WGMMA("m64n80k16", "bf16", FLASH8_NEGATION_MAJOR, FLASH8_NAMES_40, "%40", "%41", "%42",
                     FLASH8_FLOATS_40(c));
    } else if constexpr (kHalf) {
        FLASH8_WGMMA("m64n176k16", "f16", FLASH8_NEGATION_MAJOR, FLASH8_NAMES_88, "%88", "%89", "%90",
                     FLASH8_FLOATS_88(c));
    } else {
        FLASH8_WGMMA("m64n176k16", "bf16", FLASH8_NEGATION_MAJOR, FLASH8_NAMES_88, "%88", "%89", "%90",
                     FLASH8_FLOATS_88(c));
    }
}

#undef FLASH8_WGMMA
#undef FLASH8_NEGATION_MAJOR
#undef FLASH8_NEGATION
#undef FLASH8_NAMES_112
#undef FLASH8_NAMES_88
#undef FLASH8_NAMES_80
#undef FLASH8_NAMES_40
#undef FLASH8_FLOATS_112
#undef FLASH8_FLOATS_88
#undef FLASH8_FLOATS_80
#undef FLASH8_FLOATS_40
#undef FLASH8_FLOATS_8

// What CuTe calls to run the operation, found by its arguments.
template <class Element, int kN, class D, class LayoutD, class A, class LayoutA, class B, class LayoutB,
          class C, class LayoutC>
__device__ __forceinline__ void mma_unpack(cute::MMA_Traits<SpeltOut<Element, kN>> const& traits,
                                           cute::Tensor<D, LayoutD>& d, cute::Tensor<A, LayoutA> const& a,
                                           cute::Tensor<B, LayoutB> const& b,
                                           cute::Tensor<C, LayoutC> const&) {
    auto registers = cute::recast<float>(d);
    issue<Element, kN>(cute::recast<uint64_t>(a)(0), cute::recast<uint64_t>(b)(0), registers,
                       static_cast<int>(traits.accumulate_));
}

// The product of 64 x kN, of operands that lie K-major.
template <class Element, int kN, int kHeadDim>
constexpr auto k_major_mma() {
    using namespace cute;
    if constexpr (kIsSpeltOut<Element, kN>) {
        return SpeltOut<Element, kN>{};
    } else {
        return GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kN>, Int<kHeadDim>>>();
    }
}

}  // namespace flash8

template <class Element, int kN>
struct cute::MMA_Traits<flash8::SpeltOut<Element, kN>> {
    GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};
