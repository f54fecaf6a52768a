// dK and dV of a block of keys, from accumulators to global memory, without shared memory: as 16-bit rows, or
// as a split's sums.

#pragma once

#include "config.cuh"
#include "head_splits.cuh"
#include "probabilities.cuh"
#include "store_rows.cuh"

namespace flash8 {

// Every key of the sequence in this block is written: zero where it is not used or nobody sees it. dK still
// lacks the softmax scale, dV that of dropout.
template <class Config, class Dk, class Dv>
__device__ __forceinline__ void store_dk_dv(BackwardParams const& params, SharedStorage<Config> const& shared,
                                            Dk const& dk, Dv const& dv) {
    using Element = typename Config::Element;
    KeyTile const& tile = shared.tile;
    if (params.head_splits > 1) {
        using Tiles = typename Config::Tiles;
        int const part = thread_number() / 128 - 1;
        float* const sums = split_sums<Tiles>(params, tile, tile.split);
        store_split_sums<Config::kColumnsDk>(sums + part * 64 * Config::kColumnsDk, dk,
                                             thread_number() % 128);
        store_split_sums<Config::kColumnsDv>(sums + Tiles::kDkFloats + part * 64 * Config::kColumnsDv, dv,
                                             thread_number() % 128);
        return;
    }
    int const warpgroup = Config::kSplitChannels ? thread_number() / 128 - 1 : 0;
    int const first_dk = warpgroup * Config::kColumnsDk;
    int const first_dv = warpgroup * Config::kColumnsDv;
    float const dv_scale = Config::kDropout ? params.dropout.keep_scale : 1.0f;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
        int const key = thread_key<Config>() + 8 * r;
        int const row = tile.n_block * Config::kBlockN + key;
        bool const inside = row < tile.rows_k;
        bool const used = key < tile.keys;
        int64_t const target = tile.info.offset_k + static_cast<int64_t>(row);
        uint16_t* const dk_row = row_of(params.dk, tile.info.batch_k, target, tile.head_kv) + first_dk;
        uint16_t* const dv_row = row_of(params.dv, tile.info.batch_k, target, tile.head_kv) + first_dv;
        store_row<Element, Config::kColumnsDk>(dk_row, inside, used, dk, r, params.scores.softmax_scale,
                                               params.head_dim - first_dk);
        store_row<Element, Config::kColumnsDv>(dv_row, inside, used, dv, r, dv_scale,
                                               params.head_dim_v - first_dv);
    }
}

}  // namespace flash8
