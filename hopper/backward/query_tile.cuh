// Which block of queries a CTA of the kernels around the backward has.

#pragma once

#include "../attention/tile_scheduler.cuh"
#include "params.h"

namespace flash8 {

// By all threads of the CTA: a warp looks for it, all get it.
template <int kBlockM>
__device__ inline WorkTile query_tile(BackwardParams const& params) {
    __shared__ WorkTile tile;
    if (threadIdx.x < 32) {
        PackedWalk walk;  // not gone on with
        using Order = BatchOrder<BackwardParams>;
        WorkTile const found = TileScheduler<BackwardParams, kBlockM, false, 1, Order>(params, walk).first();
        if (threadIdx.x == 0) {
            tile = found;
        }
    }
    __syncthreads();
    return tile;
}

}  // namespace flash8
