// Which tiles of out a CTA computes. Every role of the CTA walks the same ones in the same order.

#pragma once

#include "config.cuh"

namespace flash8::gemm {

struct Tile {
    int m0;  // its first row and column of out
    int n0;
};

// Static and persistent: CTA i has the tiles i, i + gridDim.x, ... Tiles are numbered by bands of rows,
// inside a band column by column.
class TileWalk {
  public:
    __device__ explicit TileWalk(GemmParams const& params)
        : params_(params), index_(static_cast<int>(blockIdx.x)), count_(params.m_blocks * params.n_blocks) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        if (index_ >= count_) {
            return false;
        }
        int const band = index_ / (params_.band * params_.n_blocks);
        int const first = band * params_.band;
        int const inside = index_ - first * params_.n_blocks;
        int const rows = min(params_.band, params_.m_blocks - first);
        int const column = inside / rows;
        tile = {(first + inside - column * rows) * Config::kBlockM, column * Config::kBlockN};
        index_ += static_cast<int>(gridDim.x);
        return true;
    }

  private:
    GemmParams const& params_;
    int index_;  // the next tile; the host keeps count + gridDim.x below 2^31
    int count_;
};

// Blocks of kBlockK; TMA fills the end of the last one with zeros.
__device__ __forceinline__ int k_blocks(GemmParams const& params) {
    return (params.k + Config::kBlockK - 1) / Config::kBlockK;
}

}  // namespace flash8::gemm
