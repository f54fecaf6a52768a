// The largest of a value over the threads of a CTA, known to all of them.

#pragma once

#include "config.cuh"

namespace flash8::quantize {

__device__ __forceinline__ uint32_t largest_of_cta(uint32_t value, uint32_t (&slots)[Config::kWarps]) {
    value = __reduce_max_sync(0xffffffff, value);
    if (threadIdx.x % 32 == 0) {
        slots[threadIdx.x / 32] = value;
    }
    __syncthreads();
    uint32_t largest = 0;
#pragma unroll
    for (int warp = 0; warp < Config::kWarps; ++warp) {
        largest = max(largest, slots[warp]);
    }
    return largest;
}

// Gathers the tile's amax for its group; the bits of magnitudes have the order of the magnitudes.
__device__ __forceinline__ void gather_amax(GroupRef const& ref, int64_t group, uint32_t amax) {
    if (threadIdx.x == 0 && amax != 0) {
        atomicMax(reinterpret_cast<uint32_t*>(ref.ptr) + group, amax);
    }
}

}  // namespace flash8::quantize
