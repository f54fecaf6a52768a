// Zeroes the rows of packed O and LSE that belong to no sequence: before the first and after the last one (O
// = 0, LSE = -inf, and of an e4m3 O the scale 1).

#pragma once

#include "../clamp.cuh"
#include "config.cuh"

namespace flash8 {

// By all consumer warps of the grid, each a row of one head at a time; `warp` is the warp's number among all
// `warps`. end: the end of the last sequence, as the tile scheduler has found it.
template <class Config>
__device__ inline void zero_unused_rows(ForwardParams const& params, int end, int warp, int warps) {
    if (params.sequences.cu_seqlens_q == nullptr) {
        return;
    }
    int const total = static_cast<int>(params.sequences.total_q);
    int const before = clamped(params.sequences.cu_seqlens_q[0], 0, total);
    int64_t const count = static_cast<int64_t>(before + (total - end)) * params.heads_q;
    for (int64_t i = warp; i < count; i += warps) {
        int const unused = static_cast<int>(i / params.heads_q);
        int64_t const row = unused < before ? unused : unused - before + end;
        int const head = static_cast<int>(i % params.heads_q);
        using Stored = typename Config::Stored;
        constexpr int kUnit = 16 / sizeof(Stored);  // a row is a multiple of 16 bytes
        Stored* const o =
            static_cast<Stored*>(params.o.ptr) + row * params.o.row_stride + head * params.o.head_stride;
        for (int column = threadIdx.x % 32 * kUnit; column < params.head_dim_v; column += 32 * kUnit) {
            *reinterpret_cast<uint4*>(o + column) = make_uint4(0, 0, 0, 0);
        }
        if constexpr (Config::kOutE4m3) {
            constexpr int kScales = Config::kHeadDimV / kOutScaleChannels;
            if (threadIdx.x % 32 < kScales && params.out_scale.ptr != nullptr) {
                params.out_scale.ptr[row * params.out_scale.row_stride + head * kScales + threadIdx.x % 32] =
                    1.0f;
            }
        }
        if (threadIdx.x % 32 == 0 && params.lse.ptr != nullptr) {
            params.lse.ptr[head * params.lse.head_stride + row] = -INFINITY;
        }
    }
}

}  // namespace flash8
