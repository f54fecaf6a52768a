// PackGQA: which query and which head a row of a tile belongs to.

#pragma once

#include "tile_scheduler.cuh"

namespace flash8 {

struct QueryRow {
    int query;
    int head;
};

// A tile has the queries of one head. With kPackGqa it belongs to one KV head, and a query has a row for each
// query head that shares it: row = query * ratio + head.
template <bool kPackGqa, class Params>
__device__ __forceinline__ QueryRow query_row(Params const& params, WorkTile const& tile, int row) {
    if constexpr (kPackGqa) {
        int const ratio = params.heads_q / params.heads_kv;
        int const query = row / ratio;
        return {query, tile.head * ratio + row - query * ratio};
    }
    return {row, tile.head};
}

// All CTAs of a cluster iterate over the KV blocks of the cluster's first CTA, even a CTA whose rows lie past
// seqlen_q.
template <int kClusterM>
__device__ __forceinline__ int first_of_cluster(WorkTile const& tile) {
    return tile.m_block - tile.m_block % kClusterM;
}

template <bool kPackGqa, class Params>
__device__ __forceinline__ int kv_head(Params const& params, WorkTile const& tile) {
    return kPackGqa ? tile.head : tile.head / (params.heads_q / params.heads_kv);
}

}  // namespace flash8
