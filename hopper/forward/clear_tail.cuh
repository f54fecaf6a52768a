// Rows of V behind the last key belong to nobody: P is zero there, but 0 * NaN is NaN. Whoever reads V first
// clears them once, in the rightmost block.

#pragma once

#include "../named_barriers.cuh"

namespace flash8 {

// Clears the rows from `used` on of a tile of kRows rows, in panels of kPanelBytes. By kThreads threads,
// numbered by `thread`; afterwards all of them see it, and so does the tensor core.
template <int kRows, int kPanelBytes, int kPanels, int kThreads>
__device__ void clear_tail(void* tile, int used, int thread) {
    constexpr int kVectors = kPanelBytes / sizeof(uint4);
    int const count = (kRows - used) * kVectors;
    for (int panel = 0; panel < kPanels; ++panel) {
        // The swizzle permutes within rows of a panel, so whole rows stay whole.
        uint4* const tail = static_cast<uint4*>(tile) + (panel * kRows + used) * kVectors;
        for (int i = thread; i < count; i += kThreads) {
            tail[i] = make_uint4(0, 0, 0, 0);
        }
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTailCleared), kThreads);
}

}  // namespace flash8
