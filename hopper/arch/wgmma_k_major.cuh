// Products of 8-bit tiles that lie K-major in shared memory in rows of 128 bytes, as TMA writes them with its
// swizzle of 128 bytes. CuTe's fragments address them too, but compute each descriptor anew: ten instructions
// more a block. Here a thread keeps one word of it.

#pragma once

#include "ptx.cuh"

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

namespace flash8 {

// The low word of a tile's descriptor: its address by 16 bytes, and a leading offset that is not used. Tiles
// of whole groups of 8 rows behind it, and steps of k inside of its rows, are as many 16 bytes further. By
// all lanes of a warp, which makes it uniform.
__device__ __forceinline__ uint32_t k_major_descriptor(void const* tile) {
    uint32_t const low = (ptx::shared_address(tile) >> 4 & 0x3fff) | 0x10000;
    return __shfl_sync(0xffffffff, low, 0);
}

// Issues c = a b (kZero) or c += a b over kBlockK bytes as one group; the caller waits for it, and fences c.
// Until then the product owns c's registers.
template <bool kZero, int kBlockK, class Mma, class C>
__device__ __forceinline__ void multiply_k_major(Mma& mma, uint32_t a, uint32_t b, C& c) {
    using namespace cute;
    // Eight rows are 1024 bytes; a swizzle of 128 bytes.
    constexpr uint64_t kHigh = uint64_t{0x40000040} << 32;
    constexpr int kStep = 32;  // bytes of k of one instruction
    static_assert(kBlockK <= 128, "a row of the swizzle");
    warpgroup_arrive();
    mma.accumulate_ = kZero ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < kBlockK / kStep; ++k) {
        auto descriptor_a = make_tensor<uint64_t>(Shape<_1>{});
        auto descriptor_b = make_tensor<uint64_t>(Shape<_1>{});
        descriptor_a(0) = kHigh | (a + k * kStep / 16);
        descriptor_b(0) = kHigh | (b + k * kStep / 16);
        auto out = c(_, 0, 0);
        mma_unpack(mma, out, descriptor_a, descriptor_b, out);
        mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
}

}  // namespace flash8
