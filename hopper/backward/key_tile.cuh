// The block of keys that a CTA works on: found by its first warp, and read by all others from shared memory,
// which has room for it where registers have not.

#pragma once

#include "../attention/hidden_keys.cuh"
#include "../attention/tile_scheduler.cuh"
#include "fp8_operands.cuh"
#include "packed_offsets.cuh"
#include "query_mask.cuh"
#include "row_stats.cuh"

#include <type_traits>

namespace flash8 {

struct KeyTile {
    int64_t first_query_block;  // of the sequence, in the workspace
    SeqlenInfo info;
    QueryBlocks blocks;
    SeenKeys seen;  // keys of the block that some query of the sequence sees
    int batch;
    int head_kv;
    int split;       // of the KV head's query heads
    int first_head;  // the first query head of the split
    int group;       // so many it has
    int n_block;     // -1: none
    int rows_k;      // keys that belong to the sequence: dK and dV of those not used are zero
    int diagonal;    // the first query that sees the block's first key under a causal mask; may be negative
    int keys;        // used keys, counted from the block's first one

    __device__ bool valid() const { return n_block >= 0; }
};

// The keys' side of a call, by the names that PackedTiles has for the queries' side. Each split of a KV head
// counts as a head.
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

    __device__ KeySide(BackwardParams const& params, int splits)
        : sequences{params.sequences.cu_seqlens_k, params.sequences.total_k, params.sequences.batch},
          scheduler{params.scheduler.heads_per_section},
          heads_q(params.heads_kv * splits),
          heads_kv(params.heads_kv * splits) {}
};

static_assert(sizeof(KeyTile) == 96, "all of it is copied, so there is no padding");

// FP8: what the block's keys are multiplied with.
struct KeyTileFp8 : KeyTile {
    float score_scale;  // K's descale and softmax_scale: scores come in log2 units, or as tanh's argument
    float k_descale;
    float v_descale;
    float reserved;
};

template <class Config>
using KeyTileOf = std::conditional_t<Config::kFp8, KeyTileFp8, KeyTile>;

// The tile of this number, where each KV head has so many splits. By a whole warp.
template <int kBlockN>
__device__ inline WorkTile find_key_tile(BackwardParams const& params, int index, int splits) {
    KeySide const side(params, splits);
    if (params.sequences.cu_seqlens_k != nullptr) {
        PackedTiles<KeySide, kBlockN, false, BatchOrder<KeySide>> tiles(side);
        return tiles.at(index);
    }
    int const heads = side.heads_kv * params.sequences.batch;
    if (index >= params.max_n_blocks * heads) {
        return WorkTile::none(0);
    }
    TileOrder const order{params.max_n_blocks, heads, params.scheduler.heads_per_section};
    WorkTile tile = order.at(index, 0, 0);
    tile.batch = tile.head / side.heads_kv;
    tile.head -= tile.batch * side.heads_kv;
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

// All but what a mask says about the tile of this number, where each KV head has so many splits. By a whole
// warp, of which every lane gets the same.
template <int kBlockM, int kBlockN>
__device__ inline KeyTile read_key_block(BackwardParams const& params, int index, int splits) {
    KeyTile tile{};
    tile.n_block = -1;
    WorkTile const found = find_key_tile<kBlockN>(params, index, splits);
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
    int const n_blocks = (tile.rows_k + kBlockN - 1) / kBlockN;
    tile.n_block = n_blocks - 1 - found.m_block;
    tile.batch = found.batch;
    tile.head_kv = found.head / splits;
    tile.split = found.head - tile.head_kv * splits;
    int const heads = params.heads_q / params.heads_kv;
    int const first = tile.split * heads / splits;
    tile.first_head = tile.head_kv * heads + first;
    tile.group = (tile.split + 1) * heads / splits - first;
    tile.first_query_block = first_query_block<kBlockM>(params, found.batch, offset_q);
    int const first_key = tile.n_block * kBlockN;
    tile.diagonal = first_key - (tile.info.seqlen_k - tile.info.seqlen_q);
    tile.keys = tile.info.seqlen_k - first_key;
    tile.seen = {0, clamped(tile.keys, 0, kBlockN)};
    return tile;
}

// The tile of this CTA. By a whole warp, of which every lane gets the same.
template <class Config>
__device__ inline KeyTileOf<Config> read_key_tile(BackwardParams const& params) {
    KeyTileOf<Config> tile{};
    static_cast<KeyTile&>(tile) = read_key_block<Config::kBlockM, Config::kBlockN>(
        params, static_cast<int>(blockIdx.x), params.head_splits);
    if (!tile.valid()) {
        return tile;
    }
    [[maybe_unused]] int const first_key = tile.n_block * Config::kBlockN;
    if constexpr (Config::kMask == MaskMode::kLocal) {
        Mask<MaskMode::kLocal, Config::kBlockM, Config::kBlockN> const mask(params, tile.info);
        tile.seen.begin = clamped(mask.visible_keys(0).begin - first_key, 0, tile.seen.end);
    }
    tile.blocks = typename Config::KeyMask(params.scores, tile.info).query_blocks(tile.n_block);
    if constexpr (Config::kFp8) {
        if (!tile.blocks.empty()) {
            KeySequence const keys(params, tile.batch, tile.info.offset_k);
            ScoreParams const& scores = params.scores;
            tile.k_descale = keys.descale(params.k_descale, tile.head_kv, first_key);
            tile.v_descale = keys.descale(params.v_descale, tile.head_kv, first_key);
            tile.score_scale = tile.k_descale * (Config::kSoftcap ? scores.softmax_scale / scores.softcap
                                                                  : scores.softmax_scale_log2);
        }
    }
    return tile;
}

}  // namespace flash8
