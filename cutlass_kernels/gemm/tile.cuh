// A tile of out, and the order of tiles.

#pragma once

#include "config.cuh"

namespace flash8::gemm {

struct Tile {
    int m0;  // its first row and column of out
    int n0;
    int m_end;  // where the rows of its group end; without groups those of out
    int group;
    int k_begin;  // of its group; used with groups along K only
    int k_end;
};

// Tile number `index` of m_blocks by params.n_blocks: by bands of rows, inside a band column by column.
__device__ __forceinline__ Tile tile_in_bands(GemmParams const& params, int index, int const& m_blocks) {
    int const band = index / (params.band * params.n_blocks);
    int const first = band * params.band;
    int const inside = index - first * params.n_blocks;
    int const rows = min(params.band, m_blocks - first);
    int const column = inside / rows;
    return {(first + inside - column * rows) * Config::kBlockM, column * Config::kBlockN, 0, 0, 0, 0};
}

}  // namespace flash8::gemm
