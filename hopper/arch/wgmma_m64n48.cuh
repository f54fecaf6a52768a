// The product 64 x 48 of 16-bit operands in shared memory, A by rows and B by columns (MN-major), which CuTe
// declares only with all its extended shapes (wgmma_shapes.cuh).

#pragma once

#include <cutlass/numeric_types.h>
#include <cstdint>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace flash8 {

template <class Element>
struct Product64x48 {};

#define FLASH8_FLOATS_6(c, i) \
    "+f"(c(i)), "+f"(c(i + 1)), "+f"(c(i + 2)), "+f"(c(i + 3)), "+f"(c(i + 4)), "+f"(c(i + 5))
#define FLASH8_WGMMA_48(type)                                                                          \
    asm volatile(                                                                                      \
        "{\n"                                                                                          \
        ".reg .pred accumulate;\n"                                                                     \
        "setp.ne.b32 accumulate, %26, 0;\n"                                                            \
        "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                                    \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "           \
        "%18, %19, %20, %21, %22, %23}, %24, %25, accumulate, 1, 1, 0, 1;\n"                           \
        "}\n"                                                                                          \
        : FLASH8_FLOATS_6(c, 0), FLASH8_FLOATS_6(c, 6), FLASH8_FLOATS_6(c, 12), FLASH8_FLOATS_6(c, 18) \
        : "l"(a), "l"(b), "r"(accumulate))

template <class Element, class Accumulator>
__device__ __forceinline__ void issue_64x48(uint64_t a, uint64_t b, Accumulator&& c, int accumulate) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
        FLASH8_WGMMA_48("f16");
    } else {
        static_assert(std::is_same_v<Element, cutlass::bfloat16_t>, "float16 or bfloat16");
        FLASH8_WGMMA_48("bf16");
    }
}

#undef FLASH8_WGMMA_48
#undef FLASH8_FLOATS_6

// What CuTe calls to run the operation, found by its arguments.
template <class Element, class D, class LayoutD, class A, class LayoutA, class B, class LayoutB, class C,
          class LayoutC>
__device__ __forceinline__ void mma_unpack(cute::MMA_Traits<Product64x48<Element>> const& traits,
                                           cute::Tensor<D, LayoutD>& d, cute::Tensor<A, LayoutA> const& a,
                                           cute::Tensor<B, LayoutB> const& b,
                                           cute::Tensor<C, LayoutC> const&) {
    auto registers = cute::recast<float>(d);
    issue_64x48<Element>(cute::recast<uint64_t>(a)(0), cute::recast<uint64_t>(b)(0), registers,
                         static_cast<int>(traits.accumulate_));
}

// The product of 64 x kN, A by rows and B by columns.
template <class Element, int kN, int kDepth>
constexpr auto columns_mma() {
    using namespace cute;
    if constexpr (kN == 48) {
        return Product64x48<Element>{};
    } else {
        return GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kN>, Int<kDepth>>, GMMA::Major::K,
                                    GMMA::Major::MN>();
    }
}

}  // namespace flash8

template <class Element>
struct cute::MMA_Traits<flash8::Product64x48<Element>> {
    GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};
