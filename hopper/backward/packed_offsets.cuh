// Offsets of packed sequences as the tile scheduler takes them: each counts as the largest up to it, so that
// no two sequences share a row, whatever the tensor holds.

#pragma once

#include "../clamp.cuh"

namespace flash8 {

// The largest of cu_seqlens[0 .. last], which is where sequence `last` begins. By a whole warp.
__device__ inline int largest_offset(int32_t const* cu_seqlens, int last, int64_t total) {
    int largest = 0;
    for (int i = threadIdx.x % 32; i <= last; i += 32) {
        largest = max(largest, clamped(cu_seqlens[i], 0, static_cast<int>(total)));
    }
    return __reduce_max_sync(0xffffffff, largest);
}

}  // namespace flash8
