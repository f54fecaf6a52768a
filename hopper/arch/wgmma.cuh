// The tensor core from CuTe's fragments: one asynchronous group of products, and accumulators by row.

#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>
#include <type_traits>

namespace flash8 {

// A thread's part of 64 x kColumns accumulators: ((2 columns, 2 rows, kColumns / 8), 1, 1).
template <int kColumns>
using LayoutC =
    cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::Int<kColumns / 8>>, cute::_1, cute::_1>>;

// Mma: CuTe's traits of an operation. Issues c = a b (kZero) or c += a b over all k-steps as one group; the
// caller waits for it. Until then the product owns c's registers, and a's if a is in registers: code may
// write them only before the call or after the wait.
template <bool kZero, class Mma, class A, class B, class C>
__device__ __forceinline__ void multiply(Mma& mma, A& a, B const& b, C& c) {
    using namespace cute;
    if constexpr (!std::is_same_v<typename A::engine_type::iterator, GMMA::DescriptorIterator>) {
        warpgroup_fence_operand(a);
    }
    warpgroup_fence_operand(c);
    warpgroup_arrive();
    mma.accumulate_ = kZero ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < size<2>(a); ++k) {
        auto out = c(_, 0, 0);
        mma_unpack(mma, out, a(_, 0, k), b(_, 0, k), out);
        mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
}

// An accumulator ((2, 2, N / 8), 1, 1) as (row, (column, N / 8)).
template <class Accumulator>
__device__ __forceinline__ auto rows_of(Accumulator& c) {
    using namespace cute;
    auto const l = c.layout();
    return make_tensor(c.data(), make_layout(get<0, 1>(l), make_layout(get<0, 0>(l), get<0, 2>(l))));
}

}  // namespace flash8
