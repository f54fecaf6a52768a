// Rows of V behind the last key belong to nobody: P is zero there, but 0 * NaN is NaN. Whoever reads V first
// clears them once, in the rightmost block.

#pragma once

#include "../named_barriers.cuh"
#include "../swizzled_tile.cuh"

namespace flash8 {

// By all kThreads threads, whose writes they and the tensor core then see.
template <int kThreads>
__device__ __forceinline__ void tail_is_cleared() {
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTailCleared), kThreads);
}

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
    tail_is_cleared<kThreads>();
}

// Which bytes of word q of 16 keys hold the first `used` of them, in transpose.cuh's order: 2 q and 2 q + 1,
// then those eight further.
__device__ __forceinline__ uint32_t used_keys(int used, int q) {
    auto const pair = [](int count) { return count <= 0 ? 0x0000u : count == 1 ? 0x00ffu : 0xffffu; };
    return pair(used - 2 * q) | pair(used - 8 - 2 * q) << 16;
}

// The same for e4m3 V by keys: the columns from `used` on of kRows channels.
template <int kRows, int kColumns, int kPanelBytes, int kThreads>
__device__ void clear_transposed_tail(void* tile, int used, int thread) {
    constexpr int kChunk = sizeof(uint4);
    int const first = used / kChunk;
    int const chunks = kColumns / kChunk - first;
#pragma unroll 1
    for (int i = thread; i < kRows * chunks; i += kThreads) {
        int const chunk = first + i / kRows;
        int const offset = SwizzledTile<kRows, kPanelBytes>::offset(i % kRows, chunk * kChunk);
        uint4* const keys = reinterpret_cast<uint4*>(static_cast<char*>(tile) + offset);
        int const kept = used - chunk * kChunk;
        uint4 const old = *keys;
        *keys = make_uint4(old.x & used_keys(kept, 0), old.y & used_keys(kept, 1), old.z & used_keys(kept, 2),
                           old.w & used_keys(kept, 3));
    }
    tail_is_cleared<kThreads>();
}

}  // namespace flash8
