// The size of a tile, by what a variant is made for. Scheduler metadata counts such tiles, too.

#pragma once

namespace flash8 {

// Warps that have the same tiles, and channels of their own, where O is too large for the registers of one.
__host__ __device__ constexpr int team_warps(int head_dim_v) {
    return head_dim_v > 256 ? 4 : 1;
}

// Of K. With qv a team's first warps have K's few channels beside those of V, which is a key itself.
__host__ __device__ constexpr int warp_channels_k(int head_dim, int head_dim_v, bool qv) {
    return qv ? 32 : head_dim / team_warps(head_dim_v);
}

// Keys of a tile: what the accumulators of its scores leave room for, in slots of at most 8 KB.
// `widest_row` is the bytes that a warp has of a row of K or V.
__host__ __device__ constexpr int block_n(int widest_row, int block_m) {
    return widest_row > 256 ? 16 : widest_row > 128 || block_m == 32 ? 32 : 64;
}

}  // namespace flash8
