// Which query of which head a row of a tile is.

#pragma once

#include "tile_scheduler.cuh"

namespace flash8 {

struct QueryRow {
    int query;
    int head;
};

// A tile is made of the queries of one head; with kPackGqa it is one KV head's, and the rows of a query are
// all the query heads that share it: row = query * ratio + head.
template <bool kPackGqa, class Params>
__device__ __forceinline__ QueryRow query_row(Params const& params, WorkTile const& tile, int row) {
    if constexpr (kPackGqa) {
        int const ratio = params.heads_q / params.heads_kv;
        int const query = row / ratio;
        return {query, tile.head * ratio + row - query * ratio};
    }
    return {row, tile.head};
}

// The CTAs of a cluster walk the same keys, also one behind the last row: those of the first of them.
template <int kClusterM>
__device__ __forceinline__ int first_of_cluster(WorkTile const& tile) {
    return tile.m_block - tile.m_block % kClusterM;
}

template <bool kPackGqa, class Params>
__device__ __forceinline__ int kv_head(Params const& params, WorkTile const& tile) {
    return kPackGqa ? tile.head : tile.head / (params.heads_q / params.heads_kv);
}

}  // namespace flash8
