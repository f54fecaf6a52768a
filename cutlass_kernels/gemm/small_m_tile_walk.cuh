// Which tiles of out a CTA computes. Every role of the CTA walks the same ones in the same order.

#pragma once

#include "small_m_config.cuh"

namespace flash8::small_m {

struct Tile {
    int m0;  // its first row and column of out
    int n0;
};

// Rows of out.
struct Rows {
    int begin;
    int end;
};

// CTAs of a cluster that share the K of a tile.
__device__ __forceinline__ int splits_of(GemmParams const& params) {
    return Config::kMaxSplits > 1 ? params.splits : 1;
}

// Static and persistent: of n CTAs number i has the tiles i, i + n, ... Of the few rows of out there is
// mostly one block; where there are more, those of a block of columns follow each other, so that B is read
// once. To this class the CTAs of a cluster are one CTA. They have no second tile: the host starts a cluster
// for each.
class TileWalk {
  public:
    __device__ explicit TileWalk(GemmParams const& params)
        : m_blocks_(params.m_blocks),
          index_(static_cast<int>(blockIdx.x) / splits_of(params)),
          step_(static_cast<int>(gridDim.x) / splits_of(params)),
          count_(params.m_blocks * params.n_blocks) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        if (index_ >= count_) {
            return false;
        }
        int const column = index_ / m_blocks_;
        tile = {(index_ - column * m_blocks_) * Config::kBlockM, column * Config::kBlockN};
        index_ += step_;
        return true;
    }

  private:
    int m_blocks_;
    int index_;  // the next tile; the host keeps count + step below 2^31
    int step_;
    int count_;
};

// Blocks of kBlockK that a CTA multiplies; TMA fills the end of the last one with zeros.
struct KBlocks {
    int begin;
    int end;
};

// Of a cluster each CTA has a range, in the order of ranks; where there are too few blocks, some have none.
__device__ __forceinline__ KBlocks k_blocks(GemmParams const& params) {
    int const count = (params.k + Config::kBlockK - 1) / Config::kBlockK;
    if constexpr (Config::kMaxSplits == 1) {
        return {0, count};
    }
    int const rank = ptx::cluster_rank();
    return {rank * count / params.splits, (rank + 1) * count / params.splits};
}

}  // namespace flash8::small_m
