// Which tiles of out a CTA computes. Every role of the CTA walks the same ones in the same order.

#pragma once

#include "grouped_walk.cuh"
#include "tile.cuh"

#include <type_traits>

namespace flash8::gemm {

// Static and persistent: of n CTAs number i has the tiles i, i + n, ... The CTAs of a cluster take
// neighbouring blocks of rows: to params.m_blocks and to this class they are one CTA, whose blocks are the
// cluster's.
class DenseTileWalk {
  public:
    __device__ explicit DenseTileWalk(GemmParams const& params)
        : params_(params),
          index_(static_cast<int>(blockIdx.x) / Config::kClusterM),
          count_(params.m_blocks * params.n_blocks) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        if (index_ >= count_) {
            return false;
        }
        tile = tile_in_bands(params_, index_, params_.m_blocks);
        if constexpr (Config::kClusterM > 1) {
            tile.m0 = tile.m0 * Config::kClusterM + ptx::cluster_rank() * Config::kBlockM;
        }
        tile.m_end = params_.m;
        index_ += static_cast<int>(gridDim.x) / Config::kClusterM;
        return true;
    }

  private:
    GemmParams const& params_;
    int index_;  // the next tile; the host keeps count + gridDim.x below 2^31
    int count_;
};

using TileWalk = std::conditional_t<Config::kHasGroups, GroupedTileWalk, DenseTileWalk>;

// Blocks of kBlockK; TMA fills the end of the last one with zeros.
__device__ __forceinline__ int k_blocks(GemmParams const& params) {
    return (params.k + Config::kBlockK - 1) / Config::kBlockK;
}

// Where the first block of a tile begins, with groups along K. Scales are of blocks of all of K, whatever its
// groups: with them the first block of a group may begin before the group.
__device__ __forceinline__ int first_k(Tile const& tile) {
    return Config::kBlockScales ? tile.k_begin / Config::kBlockK * Config::kBlockK : tile.k_begin;
}

// The blocks of a tile. `all`: k_blocks of all of K, which without groups along K are those of every tile.
__device__ __forceinline__ int k_blocks_of(Tile const& tile, int all) {
    return Config::kGroupedK ? (tile.k_end - first_k(tile) + Config::kBlockK - 1) / Config::kBlockK : all;
}

}  // namespace flash8::gemm
