// The block of keys that a CTA works on: found by its first warp, and read by all others from shared memory,
// which has room for it where registers have not.

#pragma once

#include "../attention/hidden_keys.cuh"
#include "../attention/tile_scheduler.cuh"
#include "packed_offsets.cuh"
#include "query_mask.cuh"
#include "row_stats.cuh"

namespace flash8 {

struct KeyTile {
    int64_t first_query_block;  // of the sequence, in the workspace
    SeqlenInfo info;
    QueryBlocks blocks;
    SeenKeys seen;  // keys of the block that some query of the sequence sees
    int batch;
    int head_kv;
    int group;     // query heads of the KV head
    int n_block;   // -1: none
    int rows_k;    // keys that belong to the sequence: dK and dV of those not used are zero
    int diagonal;  // the first query that sees the block's first key under a causal mask; may be negative
    int keys;      // used keys, counted from the block's first one

    __device__ bool valid() const { return n_block >= 0; }
};

// The keys' side of a call, by the names that PackedTiles has for the queries' side.
struct KeySide {
    struct Sequences {
        int32_t const* cu_seqlens_q;
        int64_t total_q;
        int batch;
    };
    struct Sections {
        int heads_per_section;
    };
    Sequences sequences;
    Sections scheduler;
    int heads_q;
    int heads_kv;

    __device__ explicit KeySide(BackwardParams const& params)
        : sequences{params.sequences.cu_seqlens_k, params.sequences.total_k, params.sequences.batch},
          scheduler{params.scheduler.heads_per_section},
          heads_q(params.heads_kv),
          heads_kv(params.heads_kv) {}
};

static_assert(sizeof(KeyTile) == 88, "all of it is copied, so there is no padding");

// By a whole warp.
template <class Config>
__device__ inline WorkTile find_key_tile(BackwardParams const& params) {
    int const index = static_cast<int>(blockIdx.x);
    KeySide const side(params);
    if (params.sequences.cu_seqlens_k != nullptr) {
        PackedTiles<KeySide, Config::kBlockN, false> tiles(side);
        return tiles.at(index);
    }
    int const heads = params.heads_kv * params.sequences.batch;
    if (index >= params.max_n_blocks * heads) {
        return WorkTile::none(0);
    }
    TileOrder const order{params.max_n_blocks, heads, params.scheduler.heads_per_section};
    WorkTile tile = order.at(index, 0, 0);
    tile.batch = tile.head / params.heads_kv;
    tile.head -= tile.batch * params.heads_kv;
    return tile;
}

// Where the queries of the tile's sequence begin. By a whole warp.
__device__ inline int first_row_of_queries(SequenceParams const& sequences, WorkTile const& found) {
    if (sequences.cu_seqlens_q == nullptr) {
        return 0;
    }
    if (sequences.cu_seqlens_q == sequences.cu_seqlens_k && sequences.total_q == sequences.total_k) {
        return found.offset_q;  // the search for the tile has found it
    }
    return largest_offset(sequences.cu_seqlens_q, found.batch, sequences.total_q);
}

// By a whole warp, of which every lane gets the same.
template <class Config>
__device__ inline KeyTile read_key_tile(BackwardParams const& params) {
    KeyTile tile{};
    tile.n_block = -1;
    WorkTile const found = find_key_tile<Config>(params);
    tile.info.offset_k = found.offset_q;
    if (!found.valid()) {
        return tile;
    }
    SequenceParams const& sequences = params.sequences;
    int const offset_q = first_row_of_queries(sequences, found);
    tile.info = SeqlenInfo::read(sequences, found.batch, offset_q);
    tile.rows_k = sequences.max_seqlen_k;
    if (sequences.cu_seqlens_k != nullptr) {
        // Where the search has found it, so that no two sequences share a row of dK, whatever the offsets.
        int const total = static_cast<int>(sequences.total_k);
        int const end = clamped(sequences.cu_seqlens_k[found.batch + 1], found.offset_q, total);
        tile.info.offset_k = found.offset_q;
        tile.rows_k = end - found.offset_q;
        tile.info.seqlen_k = min(tile.info.seqlen_k, tile.rows_k);
    }
    // Tiles are numbered with the longest work first, which is the first block of keys under a causal mask.
    int const n_blocks = (tile.rows_k + Config::kBlockN - 1) / Config::kBlockN;
    tile.n_block = n_blocks - 1 - found.m_block;
    tile.batch = found.batch;
    tile.head_kv = found.head;
    tile.group = params.heads_q / params.heads_kv;
    tile.first_query_block = first_query_block<Config::kBlockM>(params, found.batch, offset_q);
    int const first_key = tile.n_block * Config::kBlockN;
    tile.diagonal = first_key - (tile.info.seqlen_k - tile.info.seqlen_q);
    tile.keys = tile.info.seqlen_k - first_key;
    tile.seen = {0, clamped(tile.keys, 0, Config::kBlockN)};
    if constexpr (Config::kMask == MaskMode::kLocal) {
        Mask<MaskMode::kLocal, Config::kBlockM, Config::kBlockN> const mask(params, tile.info);
        tile.seen.begin = clamped(mask.visible_keys(0).begin - first_key, 0, tile.seen.end);
    }
    tile.blocks = typename Config::KeyMask(params.scores, tile.info).query_blocks(tile.n_block);
    return tile;
}

}  // namespace flash8
