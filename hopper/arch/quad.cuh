// The four threads of a quad, which share the rows of an accumulator.

#pragma once

#include <cstdint>

namespace flash8 {

// words[i] of lane j becomes words[j] of lane i: a butterfly over the two bits of the lane. Or, of four lanes
// that are kApart apart, over two bits further up.
template <int kApart = 1>
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        bool const upper = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i & bit) == 0) {
                uint32_t const sent = upper ? words[i] : words[i + bit];
                uint32_t const received = __shfl_xor_sync(0xffffffff, sent, bit * kApart);
                words[i] = upper ? received : words[i];
                words[i + bit] = upper ? words[i + bit] : received;
            }
        }
    }
}

}  // namespace flash8
