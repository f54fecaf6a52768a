// A call's new keys, and its new queries, where the decode kernel appends: it takes the place of the launch
// of quantize/append.cu ahead of it, and everything has that one's bits.
//
// No thread reads a new row of the caches that this launch stores, so nobody waits for anybody:
//
//   a tile with new keys   The warp that has it waits until K and V have come, makes the rows anew from the
//                          call's, writes those that a query sees over what the loader has brought of
//                          them, and stores all of them in the caches. It is the only one that loads
//                          their place, and has done so: a unit has one block of rows.
//   other new keys         No tile of the unit has them: no query sees any key of their tile. The CTA
//                          that looks after the sequence's empty rows stores them. Nobody loads their
//                          place.
//   queries                All threads make the rows of Q of a segment in shared memory, from where they
//                          are staged.

#pragma once

#include "../quantize/new_row.cuh"
#include "rows.cuh"

#include <type_traits>

namespace flash8 {

template <class Config>
class NewKeys {
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kGroup = quantize::kGroup;
    static constexpr auto kInput =
        Config::kElement == ElementChoice::kFp16 ? quantize::Input::kFp16 : quantize::Input::kBf16;
    using TileK = SwizzledTile<kBlockN, Config::kPanelK>;
    using TileV = SwizzledTile<kBlockN, Config::kPanelV>;
    // Eight channels as the caches have them.
    using Stored = std::conditional_t<Config::kFp8, uint2, uint4>;

  public:
    // By all lanes of a warp, for the tile of K and that of V which have their keys from `position` on, in a
    // slot each.
    __device__ static void patch(DecodeParams const& params, char* slot_k, char* slot_v,
                                 Segment const& segment, SequenceWork<Config> const& sequence, int position) {
        int const start = params.append.place.cache_seqlens[segment.batch];
        int const begin = max(start, position);
        int const keys =
            min(position + kBlockN - begin,
                quantize::NewToken::count(params.append.rows[1], segment.batch) - (begin - start));
        if (start < 0 || keys <= 0) {
            return;
        }
        int const of_k = keys * (params.append.rows[1].head_dim / kGroup);
        int const of_v = keys * (params.append.rows[2].head_dim / kGroup);
#pragma unroll 1
        for (int item = threadIdx.x % 32; item < of_k + of_v; item += 32) {
            bool const is_v = item >= of_k;
            int const groups = params.append.rows[is_v ? 2 : 1].head_dim / kGroup;
            int const place = is_v ? item - of_k : item;
            int const key = begin + place / groups;
            int const channel = place % groups * kGroup;
            NewRow const row(params, is_v, segment.batch, key - start, segment.head);
            if (!row.place.exists) {
                continue;
            }
            Stored const made = row.made(channel);
            row.store(channel, made);
            if (key >= sequence.begin && key < sequence.end) {
                int const byte = channel * Config::kElementBytes;
                char* const target = is_v ? slot_v + TileV::offset(key - position, byte)
                                          : slot_k + TileK::offset(key - position, byte);
                *reinterpret_cast<Stored*>(target) = made;
            }
        }
        if constexpr (!Config::kGather) {
            ptx::fence_proxy_async();  // before TMA fills the slots again
        }
        __syncwarp();
    }

    // By all threads of a CTA: the new rows of a sequence that no unit has a tile for.
    __device__ static void store_others(DecodeParams const& params, int batch,
                                        SequenceWork<Config> const& sequence) {
        int const start = params.append.place.cache_seqlens[batch];
        int const tokens = quantize::NewToken::count(params.append.rows[1], batch);
        // Keys [begin, end) have tiles.
        int const begin = sequence.tiles == 0 ? 0 : sequence.first_tile() * kBlockN;
        int const end = begin + sequence.tiles * kBlockN;
        if (start < 0 || (start >= begin && tokens <= end - start)) {
            return;
        }
        int const heads = params.append.rows[1].heads;
        int const groups_k = params.append.rows[1].head_dim / kGroup;
        int const groups = groups_k + params.append.rows[2].head_dim / kGroup;
        // The host keeps their number below 2^30.
#pragma unroll 1
        for (int item = threadIdx.x; item < tokens * heads * groups; item += Config::kThreads) {
            int const index = item / groups / heads;
            bool const is_v = item % groups >= groups_k;
            int const channel = (item % groups - (is_v ? groups_k : 0)) * kGroup;
            NewRow const row(params, is_v, batch, index, item / groups % heads);
            if (row.place.exists && (start + index < begin || start + index >= end)) {
                row.store(channel, row.made(channel));
            }
        }
    }

    // By all threads: the rows of Q of a segment, normalised and rotated.
    __device__ static void make_queries(DecodeParams const& params, SharedStorage<Config>& shared,
                                        Segment const& segment, SequenceWork<Config> const& sequence) {
        SeqlenInfo const& info = sequence.info;
        AppendedRows const& rows = params.append.rows[0];
        int const groups = rows.head_dim / kGroup;
#pragma unroll 1
        for (int item = threadIdx.x; item < Config::kBlockM * groups; item += Config::kThreads) {
            int const row = item / groups;
            int const channel = item % groups * kGroup;
            UnitRow const at = UnitRow::of<Config>(params, segment, row);
            if (at.query >= sequence.queries) {
                continue;
            }
            int64_t const element = info.batch_q * rows.x.batch_stride +
                                    (info.offset_q + int64_t{at.query}) * rows.x.row_stride +
                                    at.head * rows.x.head_stride;
            auto const token = quantize::NewToken::at(segment.batch, at.query);
            auto group = quantize::Group<kInput>::load(rows.x, element + channel);
            float y[kGroup];
            quantize::normalise_and_turn(params.append.rotary, rows, token, element, channel, group, y);
            *reinterpret_cast<uint4*>(&shared.queries.of[row][channel]) = stored(group);
        }
    }

  private:
    // One new row of K or V, of one head.
    struct NewRow {
        AppendParams const& append;
        AppendedRows const& rows;
        quantize::NewToken const token;
        quantize::Place const place;
        int head;

        __device__ NewRow(DecodeParams const& params, bool is_v, int batch, int index, int head_kv)
            : append(params.append),
              rows(append.rows[is_v ? 2 : 1]),
              token(quantize::NewToken::of_sequence(rows, batch, index)),
              place(append.place, token),
              head(head_kv) {}

        // Eight channels as the caches have them.
        __device__ Stored made(int channel) const {
            int64_t const element = token.element + head * rows.x.head_stride;
            auto group = quantize::Group<kInput>::load(rows.x, element + channel);
            float y[kGroup];
            quantize::normalise_and_turn(append.rotary, rows, token, element, channel, group, y);
            if constexpr (Config::kFp8) {
                return quantize::quantized(rows, head, channel, token, place, y);
            } else {
                return stored(group);
            }
        }

        __device__ void store(int channel, Stored const& values) const {
            int64_t const target = place.slot * rows.out.batch_stride + place.row * rows.out.row_stride +
                                   head * rows.out.head_stride + channel;
            *reinterpret_cast<Stored*>(static_cast<char*>(rows.out.ptr) + target * Config::kElementBytes) =
                values;
        }
    };

    __device__ __forceinline__ static uint4 stored(quantize::Group<kInput> const& group) {
        return make_uint4(group.words[0], group.words[1], group.words[2], group.words[3]);
    }
};

}  // namespace flash8
