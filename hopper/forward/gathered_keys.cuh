// Where the keys of a tile are, for warps of the producer warpgroup that copy rows themselves.

#pragma once

#include "../arch/ptx.cuh"
#include "../attention/pack_gqa.cuh"
#include "../attention/pages.cuh"
#include "../attention/seqlen_info.cuh"
#include "params.h"

namespace flash8 {

// What the queries of a warp's tile see of a row of the cache. It lies in shared memory because these warps
// have few registers.
struct GatheredKeys {
    static constexpr int64_t kNowhere = INT64_MIN;  // addresses are not negative

    int first_block;  // the last one to be gathered
    int table_row;    // of a cache without pages: its own row
    int offset;       // where the first block begins
    int first_seen;   // keys [first_seen, end_seen) are those that some query sees
    int end_seen;
    int head;

    // By the whole warp; the lanes have read what was there before. Gives the end of the tile's blocks.
    template <class Config>
    __device__ int enter(ForwardParams const& params, SeqlenInfo const& info, WorkTile const& tile) {
        typename Config::TileMask const mask(params, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            *this = {blocks.begin,
                     info.batch_k,
                     info.offset_k,
                     info.offset_k + blocks.first_key,
                     info.offset_k + blocks.end_key,
                     kv_head<Config::kPackGqa>(params, tile)};
        }
        __syncwarp();
        return blocks.end;
    }

    // The place of a key, counted from the first block. What no query of the tile sees is in no page.
    template <bool kAlwaysPaged>
    __device__ __forceinline__ KeyPlace look_up(PageParams const& pages, int key) const {
        int const position = offset + key;
        bool const seen = position >= first_seen && position < end_seen;
        if (!kAlwaysPaged && pages.page_table == nullptr) {
            return {seen ? table_row : pages.num_pages, position};
        }
        return look_up_page(pages, table_row, position, seen);
    }

    // The address of a row of elements of kBytes, or kNowhere.
    template <int kBytes>
    __device__ __forceinline__ int64_t address_of(PageParams const& pages, TensorRef const& ref,
                                                  KeyPlace const& place) const {
        bool const exists = place.page >= 0 && place.page < pages.num_pages;
        int64_t const elements =
            place.page * ref.batch_stride + place.row * ref.row_stride + head * ref.head_stride;
        int64_t const bytes = elements * kBytes;
        return exists ? reinterpret_cast<int64_t>(ref.ptr) + bytes : kNowhere;
    }

    __device__ __forceinline__ static int lane_index() { return ptx::lane_index(); }
};

}  // namespace flash8
