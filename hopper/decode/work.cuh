// Which CTA works on which keys.
//
// A unit is a block of rows of one sequence and one KV head. The tiles of keys that its rows see are numbered
// through, over all units in the order of sequence, head, block. Every CTA takes an equal share of the
// numbers, found on the device: lengths may change between the replays of a graph. What a CTA has of a unit
// is a segment. A unit may be one segment, or its keys are shared out among neighbouring CTAs; only a CTA's
// first and last segment can be such parts.
//
// With split_keys the keys of a unit are cut at fixed places, into splits. Splits are what is numbered and
// shared out then, and each is a segment: so what happens to a sequence does not depend on its neighbours.
//
// The teams of a CTA, mostly single warps, share out a segment's tiles, each taking neighbours.

#pragma once

#include "../attention/mask.cuh"
#include "../attention/seqlen_info.cuh"
#include "../quantize/new_token.cuh"
#include "params.h"

namespace flash8 {

// The first row of a sequence in packed Q, by the largest offset of the sequences before it: where offsets
// decrease, every row still belongs to one sequence at most.
__device__ __forceinline__ int first_row(SequenceParams const& sequences, int batch, int before) {
    if (sequences.cu_seqlens_q == nullptr) {
        return 0;
    }
    return max(before, clamped(sequences.cu_seqlens_q[batch], 0, static_cast<int>(sequences.total_q)));
}

// The same of 32 sequences from `first` on, one a lane, by all lanes of a warp. `before` is the first row of
// the last sequence before them, and then that of the last one of them.
__device__ __forceinline__ int first_rows(SequenceParams const& sequences, int first, int& before) {
    int const lane = threadIdx.x % 32;
    int row = first + lane < sequences.batch ? first_row(sequences, first + lane, before) : before;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        // A lane without a lower one gets its own.
        row = max(row, __shfl_up_sync(0xffffffff, row, distance));
    }
    before = __shfl_sync(0xffffffff, row, 31);
    return row;
}

// One sequence. Keys are counted by their place in the cache, left padding included.
template <class Config>
struct SequenceWork {
    SeqlenInfo info;
    int begin;  // keys [begin, end) are those that some query sees
    int end;
    int common_begin;  // keys [common_begin, common_end) are those that every query sees
    int common_end;
    int queries;  // that there is work for; the mask goes by info.seqlen_q
    int tiles;    // of a unit
    int pieces;   // that it is shared out in: its tiles, or its splits
    int m_blocks;

    // offset_q: `first_row` of the sequence.
    __device__ static SequenceWork read(DecodeParams const& params, int batch, int offset_q) {
        if constexpr (Config::kAppend) {
            unsigned const new_keys = quantize::count_of(params.append.rows[1], batch);
            SequenceWork work = of(params, SeqlenInfo::read(params.sequences, batch, offset_q, new_keys));
            // Tiles with new keys are not as they are loaded.
            work.common_end = min(work.common_end, max(0, params.sequences.seqused_k[batch]));
            return work;
        }
        return of(params, SeqlenInfo::read(params.sequences, batch, offset_q));
    }

    __device__ static SequenceWork of(DecodeParams const& params, SeqlenInfo const& info) {
        SequenceWork work{};
        work.info = info;
        // The host has counted units by this bound.
        work.queries = min(info.seqlen_q, params.sequences.max_seqlen_q);
        if (work.queries == 0) {
            return work;
        }
        typename Config::TileMask const mask(params, work.info);
        KeyRange const head = mask.visible_keys(0);
        KeyRange const tail = mask.visible_keys(work.queries - 1);
        int const offset_k = work.info.offset_k;
        work.begin = offset_k + max(0, head.begin);
        work.end = offset_k + max(0, tail.end);
        work.common_begin = offset_k + max(0, tail.begin);
        // A query may see none of the new keys of a tree.
        int const common_end = params.tree_mask == nullptr ? head.end : min(head.end, work.first_new_key());
        work.common_end = offset_k + max(0, common_end);
        if (work.begin < work.end) {
            work.tiles = (work.end + Config::kBlockN - 1) / Config::kBlockN - work.first_tile();
        }
        int const of_split = split_tiles(params);
        work.pieces = of_split == 0 ? work.tiles : (work.tiles + of_split - 1) / of_split;
        int const ratio = params.heads_q / params.heads_kv;
        work.m_blocks = (work.queries * ratio + Config::kBlockM - 1) / Config::kBlockM;
        return work;
    }

    // Of the keys that have queries of their own, counted without the left padding.
    __device__ int first_new_key() const { return info.seqlen_k - info.seqlen_q; }
    __device__ int first_tile() const { return begin / Config::kBlockN; }
    __device__ int all_pieces(DecodeParams const& params) const {
        return pieces * m_blocks * params.heads_kv;
    }
    // Of a split, or 0.
    __device__ static int split_tiles(DecodeParams const& params) {
        return params.split_keys / Config::kBlockN;
    }
};

// Consecutive numbers of pieces, and where the first of them is.
struct Share {
    int pieces_per_cta;
    int begin;
    int end;
    int batch;        // the sequence of the first piece, or -1
    int batch_begin;  // the number of that sequence's first piece
    int batch_row;    // that sequence's first row
};

// Of the lanes up to this one, by all lanes of a warp.
__device__ __forceinline__ int inclusive_sum(int value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        int const below = __shfl_up_sync(0xffffffff, value, distance);
        value += threadIdx.x % 32 >= distance ? below : 0;
    }
    return value;
}

// The host keeps the number of pieces below 2^30.
template <class Config>
class Shares {
  public:
    // Of `all` pieces, but for where the first one is.
    __device__ static Share of_pieces(DecodeParams const& params, int all) {
        int const ctas = static_cast<int>(gridDim.x);
        int const least = params.split_keys == 0 ? Config::kLeastTiles : 1;
        Share share{};
        share.batch = -1;
        share.pieces_per_cta = max((all + ctas - 1) / ctas, least);
        share.begin = min(static_cast<int>(blockIdx.x) * share.pieces_per_cta, all);
        share.end = min(share.begin + share.pieces_per_cta, all);
        return share;
    }

    // By all lanes of a warp.
    __device__ static Share of_cta(DecodeParams const& params) {
        int const lane = threadIdx.x % 32;
        Share share{};
        share.batch = -1;
        // The first pass counts, the second finds the sequence of the first piece.
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            int before = 0;
            int row_before = 0;
#pragma unroll 1
            for (int first = 0; first < params.sequences.batch && share.batch < 0; first += 32) {
                bool const exists = first + lane < params.sequences.batch;
                int const row = first_rows(params.sequences, first, row_before);
                int const own =
                    exists ? SequenceWork<Config>::read(params, first + lane, row).all_pieces(params) : 0;
                int const end = before + inclusive_sum(own);
                unsigned const ends_after = __ballot_sync(0xffffffff, pass == 1 && end > share.begin);
                if (ends_after != 0) {
                    int const found = __ffs(ends_after) - 1;
                    share.batch = first + found;
                    share.batch_begin = __shfl_sync(0xffffffff, end - own, found);
                    share.batch_row = __shfl_sync(0xffffffff, row, found);
                }
                before = __shfl_sync(0xffffffff, end, 31);
            }
            if (pass == 0) {
                share = of_pieces(params, before);
            }
        }
        return share;
    }
};

// What a CTA has of one unit: tiles [begin, end) of it.
struct Segment {
    int batch;
    int head;  // of K and V
    int m_block;
    int begin;
    int end;
    int first_cta;  // that has a part of the unit
    int last_cta;
    int first_piece;  // of the unit
    int piece;        // this one: a split, or the first of the tiles
    bool ends_here;   // no more of the unit is this CTA's

    // Tiles [begin, end) of one team.
    template <class Config>
    __device__ KeyRange of_team(int team) const {
        int const tiles = end - begin;
        return {begin + tiles * team / Config::kTeams, begin + tiles * (team + 1) / Config::kTeams};
    }
};

// Walks over the segments of a CTA. Its loader runs ahead of the products, so there are two of them.
template <class Config>
struct Walk {
    int piece;  // the number of the first piece of the next segment
    int end;
    int pieces_per_cta;
    int sequence_begin;  // the number of the sequence's first piece
    int sequence_row;    // its first row
    SequenceWork<Config> sequence;
    Segment segment;

    __device__ static Walk over(Share const& share) {
        Walk walk{};
        walk.piece = share.begin;
        walk.end = share.end;
        walk.pieces_per_cta = share.pieces_per_cta;
        walk.sequence_begin = share.batch_begin;
        walk.sequence_row = share.batch_row;
        walk.segment.batch = share.batch - 1;  // which has no pieces here
        return walk;
    }

    // False at the end of the share.
    __device__ bool next(DecodeParams const& params) {
        if (piece >= end) {
            return false;
        }
#pragma unroll 1
        while (piece >= sequence_begin + sequence.all_pieces(params)) {
            sequence_begin += sequence.all_pieces(params);
            segment.batch += 1;
            sequence_row = first_row(params.sequences, segment.batch, sequence_row);
            sequence = SequenceWork<Config>::read(params, segment.batch, sequence_row);
        }
        int const unit = (piece - sequence_begin) / sequence.pieces;
        int const unit_begin = sequence_begin + unit * sequence.pieces;
        segment.first_cta = unit_begin / pieces_per_cta;
        segment.last_cta = (unit_begin + sequence.pieces - 1) / pieces_per_cta;
        segment.head = unit / sequence.m_blocks;
        segment.m_block = unit - segment.head * sequence.m_blocks;
        segment.first_piece = unit_begin;
        segment.piece = piece;
        // A split at a time, or all of the unit that there is.
        int const of_split = SequenceWork<Config>::split_tiles(params);
        int const index = piece - unit_begin;
        int const taken = of_split != 0 ? 1 : min(end - piece, sequence.pieces - index);
        int const tiles_of_piece = of_split != 0 ? of_split : 1;
        segment.begin = index * tiles_of_piece;
        segment.end = min(segment.begin + taken * tiles_of_piece, sequence.tiles);
        segment.ends_here = piece + taken == end || index + taken == sequence.pieces;
        piece += taken;
        return true;
    }
};

}  // namespace flash8
