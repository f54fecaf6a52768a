// The one parameter of the appending kernel, shared by host and device by the rules of hopper/params.h.
//
//     q'    = position(norm(q))
//     cache = cast((position(norm(k)) - mean) * (1 / descale))  V likewise, without a position and a norm
//     norm(x) = x * (1 / sqrt(mean(x^2) + eps)) * weight
//
// Each step is optional, and in fp32. A cache of x's own type has no mean and no descale: what has no
// position and no norm is copied bit by bit.

#pragma once

#include "../params.h"

namespace flash8 {

// The new rows of Q, K or V.
struct AppendedRows {
    TensorRef x;    // (batch, seqlen, heads, head_dim) or packed (total, heads, head_dim)
    TensorRef out;  // Q: as x. K and V: the cache, (slots, tokens, heads, head_dim)
    ChannelRef mean;
    DescaleRef descale;              // a block is kScaleBlock tokens of a slot
    const std::int32_t* cu_seqlens;  // (batch + 1), null: dense
    const void* norm_weight;         // (head_dim), fp32 or x's type; null: no norm
    std::int32_t tokens;             // of x: batch * seqlen, or the total
    std::int32_t seqlen;             // of a dense x
    std::int32_t heads;              // 0: the call has none of these
    std::int32_t head_dim;
    std::int32_t descale_by_slot;  // 1: the batch coordinate of a descale is the slot, not the sequence
    std::int32_t rotates;          // 1: by RotaryParams
    std::int32_t advances;         // 1: a token's position is one past that before; 0: all have the first's
    std::int32_t norm_is_fp32;     // the weight
    float norm_eps;
    std::int32_t reserved;  // zero
};

struct RotaryParams {
    const void* cos;  // (positions, rotary_dim / 2), fp32 or x's type; null: no rotary embedding
    const void* sin;
    const std::int32_t* offsets;  // (batch): the position of a sequence's first new token; null: 0
    std::int64_t cos_stride;
    std::int64_t sin_stride;
    std::int32_t positions;
    std::int32_t rotary_dim;
    std::int32_t interleaved;
    std::int32_t is_fp32;  // the tables
};

// Where new tokens go: after the cache_seqlens[b] tokens that sequence b has in the caches. A slot is a page,
// or without a page table a row of the caches. Tokens without a place are dropped.
struct PlaceParams {
    const std::int32_t* cache_seqlens;  // (batch)
    const std::int32_t* page_table;     // (table_rows, max_pages), or null
    const std::int32_t*
        kv_batch_idx;  // (batch): rows of the page table, or of the caches; null: the sequence
    std::int64_t page_table_stride;
    std::int32_t table_rows;
    std::int32_t max_pages;
    std::int32_t num_slots;
    std::int32_t slot_tokens;  // tokens that a slot has room for
};

struct AppendParams {
    AppendedRows rows[3];  // Q, K, V
    RotaryParams rotary;
    PlaceParams place;
    std::int32_t* lengths;  // (batch), written: cache_seqlens and the new tokens; null: not wanted
    std::int32_t batch;
    std::int32_t reserved;  // zero
};

static_assert(kIsPlain<AppendParams> && alignof(AppendParams) == 8);
static_assert(sizeof(AppendParams) <= 4096);

}  // namespace flash8
