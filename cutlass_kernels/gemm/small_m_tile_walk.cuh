// Which tiles of out a CTA computes. Every role of the CTA walks the same ones in the same order.

#pragma once

#include "small_m_config.cuh"

namespace flash8::small_m {

struct Tile {
    int m0;  // its first row and column of out
    int n0;
};

// Static and persistent: CTA i has the tiles i, i + gridDim.x, ... Of the few rows of out there is mostly one
// block; where there are more, those of a block of columns follow each other, so that B is read once.
class TileWalk {
  public:
    __device__ explicit TileWalk(GemmParams const& params)
        : m_blocks_(params.m_blocks),
          index_(static_cast<int>(blockIdx.x)),
          count_(params.m_blocks * params.n_blocks) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        if (index_ >= count_) {
            return false;
        }
        int const column = index_ / m_blocks_;
        tile = {(index_ - column * m_blocks_) * Config::kBlockM, column * Config::kBlockN};
        index_ += static_cast<int>(gridDim.x);
        return true;
    }

  private:
    int m_blocks_;
    int index_;  // the next tile; the host keeps count + gridDim.x below 2^31
    int count_;
};

// Blocks of kBlockK; TMA fills the end of the last one with zeros.
__device__ __forceinline__ int k_blocks(GemmParams const& params) {
    return (params.k + Config::kBlockK - 1) / Config::kBlockK;
}

}  // namespace flash8::small_m
