// The tiles of the backward, and how a block of dQ lies in the workspace: what its kernels agree on.

#pragma once

#include "../arch/swizzled_tile.cuh"

namespace flash8 {

// kFp8: Q and K are in shared memory twice.
template <int kHeadDim, int kHeadDimV, bool kFp8>
struct BackwardTiles {
    static constexpr int kWidestHead = kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV;
    static constexpr int kWarpgroups = 2;  // that compute
    // Up to 128 channels the warpgroups share out a block's keys. Wider dK and dV of 64 keys do not fit the
    // registers of one: then each makes half the channels of all keys.
    static constexpr bool kSplitChannels = kWidestHead > 128;
    static constexpr int kBlockM = kWidestHead <= 64 ? 128 : 64;
    static constexpr int kBlockN = kSplitChannels ? 64 : 64 * kWarpgroups;

    // Each warpgroup makes 64 queries x kDqColumns of a block of dQ: all channels of half the queries, or
    // half the channels of all queries.
    static constexpr bool kSplitDqRows = kBlockM == 128;
    static constexpr int kDqColumns = kSplitDqRows ? kHeadDim : kHeadDim / kWarpgroups;
    // A part is what one warpgroup makes. Thread t's i-th four accumulators are its vector 128 i + t.
    static constexpr int kDqPart = 64 * kDqColumns;
    static constexpr int kDqFloats = kWarpgroups * kDqPart;
    static_assert(kDqFloats == kBlockM * kHeadDim);
    // A warpgroup makes its part in so many slices of columns, one after the other. These and the stages of
    // dO are what shared memory has room for.
    static constexpr int kDqSlices = kWidestHead > 192 || (kFp8 && kHeadDimV > 128) ? 2 : 1;
    static constexpr int kStagesDo = kWidestHead > 192 || (kFp8 && kSplitChannels) ? 1 : 2;

    // What a warpgroup makes of dK and dV, of 64 keys.
    static constexpr int kColumnsDk = kSplitChannels ? kHeadDim / kWarpgroups : kHeadDim;
    static constexpr int kColumnsDv = kSplitChannels ? kHeadDimV / kWarpgroups : kHeadDimV;
    static constexpr int kDkFloats = kBlockN * kHeadDim;
    static constexpr int kDkvFloats = kBlockN * (kHeadDim + kHeadDimV);
    // The panels of 16-bit Q, which hold no channel of the other warpgroup's dK.
    static constexpr int kPanelQ = panel_bytes(2 * kColumnsDk) / 2;
};

}  // namespace flash8
