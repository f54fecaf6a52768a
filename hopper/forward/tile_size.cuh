// The tiles of the forward kernel.

#pragma once

#include "../attention/descales.cuh"
#include "../attention/mask.cuh"

namespace flash8 {

// kBlockM x kBlockN: the largest tiles whose accumulators fit the registers without spilling and whose stages
// fit shared memory. Descales per block of keys want tiles of just such a block.
constexpr int block_m(int head_dim) {
    return head_dim <= 64 ? 192 : 128;
}
constexpr int block_n(int head_dim, int head_dim_v, MaskMode mask) {
    if (head_dim == 128 && head_dim_v == 128 && mask == MaskMode::kNone) {
        return 176;
    }
    if (head_dim_v <= 128 && head_dim <= 192) {
        return 128;
    }
    if (head_dim <= 192 && head_dim_v <= 192) {
        return 96;
    }
    return mask == MaskMode::kLocal ? 64 : 80;
}
// 176 keys would be eleven boxes of 16, whatever the page.
constexpr int block_n_paged(int head_dim, int head_dim_v, MaskMode mask) {
    return block_n(head_dim, head_dim_v, mask == MaskMode::kNone ? MaskMode::kCausal : mask);
}
// Beside two stages of both, shared memory has a tile of K and one of V as e4m3. Each of four warps widens a
// quarter of a tile, eight rows at a time, after which the swizzle repeats; panels of 64 bytes, which a head
// of 96 has, take sixteen. At head_dim 64 the producer keeps registers that three consumer warpgroups lack
// for 128 keys.
constexpr int block_n_widened(int head_dim, int head_dim_v) {
    int const widest = head_dim > head_dim_v ? head_dim : head_dim_v;
    if (widest <= 128) {
        return widest <= 64 ? 96 : 128;
    }
    return head_dim <= 192 && head_dim_v <= 128 && head_dim_v != 96 ? 96 : 64;
}
// Drawing takes registers.
constexpr int block_n_dropout(int head_dim, int head_dim_v) {
    if (head_dim_v <= 128 && head_dim <= 192) {
        return head_dim <= 64 ? 80 : 96;
    }
    return head_dim <= 192 && head_dim_v <= 192 ? 80 : 64;
}
constexpr int block_n_fp8(int head_dim, int head_dim_v, ScaleGranularity scales, bool overlaps_pv) {
    bool const wide =
        !overlaps_pv && scales != ScaleGranularity::kBlock && head_dim > 64 && head_dim_v <= 128;
    return !wide ? kScaleBlock : head_dim_v == 128 && head_dim <= 192 ? 224 : 192;
}

}  // namespace flash8
