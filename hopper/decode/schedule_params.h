// The one parameter of the kernel that makes scheduler metadata.

#pragma once

#include "params.h"

namespace flash8 {

// The decode calls that the metadata is for, as far as it is known before they are made. Bounds that are not
// known are large: they only clamp what indices are wrong.
struct ScheduleParams {
    DecodeParams call;  // sequences, masks, head counts and split_keys count; nothing else is read
    std::int32_t* scheduler_metadata;      // (batch + 1), written
    const std::int32_t* cu_seqlens_k_new;  // (batch + 1): keys that are appended to seqused_k, or null
    std::int32_t seqlen_k_new;             // as many for every sequence, where there is no cu_seqlens_k_new
    // What the decode kernel is made for.
    std::int32_t block_m;
    std::int32_t tile_head_dim;
    std::int32_t tile_head_dim_v;
    std::int32_t qv;
    std::int32_t element_bytes;  // of the cache
    std::int32_t reserved[6];    // zero: fills the struct up to its 64-byte alignment
};

static_assert(kIsPlain<ScheduleParams> && alignof(ScheduleParams) == 64);
static_assert(sizeof(ScheduleParams) <= 4096, "the parameter space that every driver accepts");

}  // namespace flash8
