// Zeroes the rows of V that no query of a tile sees: past the last key, where memory may hold anything, and
// left of the window. P is zero there, but 0 * NaN is NaN. The warps that read V first clear these rows
// once: in the rightmost block, and with a window in the leftmost one.

#pragma once

#include "../arch/named_barriers.cuh"
#include "../arch/swizzled_tile.cuh"
#include "mask.cuh"

namespace flash8 {

// Keys [begin, end) of a tile of kKeys that some query sees.
struct SeenKeys {
    int begin;
    int end;

    template <int kKeys>
    __device__ __forceinline__ static SeenKeys of(KeyBlocks const& blocks, int n_block) {
        return {max(blocks.first_key - n_block * kKeys, 0), min(blocks.end_key - n_block * kKeys, kKeys)};
    }
    template <int kKeys>
    __device__ __forceinline__ bool all() const {
        return begin == 0 && end == kKeys;
    }
};

// By all kThreads threads. Afterwards they and the tensor core see the writes of all of them.
template <int kThreads>
__device__ __forceinline__ void hidden_keys_are_cleared() {
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kHiddenKeysCleared), kThreads);
}

// Clears the rows that are not `seen` of a tile of kRows rows, in panels of kPanelBytes. By kThreads threads,
// numbered by `thread`; afterwards all of them see it, and so does the tensor core.
template <int kRows, int kPanelBytes, int kPanels, int kThreads>
__device__ void clear_hidden_keys(void* tile, SeenKeys const& seen, int thread) {
    constexpr int kVectors = kPanelBytes / sizeof(uint4);
    int const before = seen.begin * kVectors;
    int const count = before + (kRows - seen.end) * kVectors;
    for (int panel = 0; panel < kPanels; ++panel) {
        // The swizzle permutes within rows of a panel, so whole rows stay whole.
        uint4* const rows = static_cast<uint4*>(tile) + panel * kRows * kVectors;
        for (int i = thread; i < count; i += kThreads) {
            rows[i < before ? i : i - before + seen.end * kVectors] = make_uint4(0, 0, 0, 0);
        }
    }
    hidden_keys_are_cleared<kThreads>();
}

// Which bytes of word q of 16 keys hold the first `count` of them, in transpose_v.cuh's order: 2 q and 2 q +
// 1, then those eight further.
__device__ __forceinline__ uint32_t first_keys(int count, int q) {
    auto const pair = [](int n) { return n <= 0 ? 0x0000u : n == 1 ? 0x00ffu : 0xffffu; };
    return pair(count - 2 * q) | pair(count - 8 - 2 * q) << 16;
}

// The same for column-major e4m3 V: clears the columns that are not `seen` of kRows channels, in 16-byte
// chunks.
template <int kRows, int kColumns, int kPanelBytes, int kThreads>
__device__ void clear_hidden_columns(void* tile, SeenKeys const& seen, int thread) {
    constexpr int kChunk = sizeof(uint4);
    int const before = (seen.begin + kChunk - 1) / kChunk;
    int const after = max(seen.end / kChunk, before);  // one chunk may hold both ends
    int const chunks = before + kColumns / kChunk - after;
#pragma unroll 1
    for (int i = thread; i < kRows * chunks; i += kThreads) {
        int const chunk = i / kRows < before ? i / kRows : i / kRows - before + after;
        int const offset = SwizzledTile<kRows, kPanelBytes>::offset(i % kRows, chunk * kChunk);
        uint4* const keys = reinterpret_cast<uint4*>(static_cast<char*>(tile) + offset);
        int const begin = seen.begin - chunk * kChunk;
        int const end = seen.end - chunk * kChunk;
        auto const kept = [&](uint32_t word, int q) {
            return word & first_keys(end, q) & ~first_keys(begin, q);
        };
        uint4 const old = *keys;
        *keys = make_uint4(kept(old.x, 0), kept(old.y, 1), kept(old.z, 2), kept(old.w, 3));
    }
    hidden_keys_are_cleared<kThreads>();
}

}  // namespace flash8
