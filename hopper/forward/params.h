// The one parameter of the forward kernel.

#pragma once

#include "../attention/params.h"

namespace flash8 {

struct ForwardParams {
    TensorMap tma_q;
    TensorMap tma_k;
    TensorMap tma_v;

    TensorRef q;  // (batch, seqlen_q, heads_q, head_dim)
    TensorRef k;  // (batch_k, seqlen_k, heads_kv, head_dim), or with KernelInfo::paged
                  // (num_pages, page_size, heads_kv, head_dim)
    TensorRef v;  // likewise, head_dim_v; or with KernelInfo::v_colmajor
                  // (batch_k, heads_kv, head_dim_v, 128 * blocks), where row_stride steps over head_dim_v
    TensorRef o;  // (batch, seqlen_q, heads_q, head_dim_v)
    RowRef lse;   // natural log

    DescaleRef q_descale;
    DescaleRef k_descale;
    DescaleRef v_descale;
    ChannelRef k_mean;  // subtracted from K beforehand: LSE gets softmax_scale * q . k_mean back
    ChannelRef v_mean;  // subtracted from V beforehand: O gets it back, times the weight of the keys
    ChannelRef v_channel_descale;  // V's by channel, in addition to v_descale

    SequenceParams sequences;
    ScoreParams scores;
    SchedulerParams scheduler;

    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
    ElementType o_type;                // kFloat16 or kBfloat16; for 16-bit inputs the type of q
    std::int32_t heads_per_q_descale;  // query heads that share a descale: 1, or heads_q / heads_kv
    DropoutParams dropout;
    PageParams pages;          // of a kernel that reads pages; sequences.batch_k is the rows of page_table
    std::int32_t reserved[6];  // zero: fills the struct up to its 64-byte alignment
};

static_assert(kIsPlain<ForwardParams> && alignof(ForwardParams) == 64);
static_assert(sizeof(ForwardParams) <= 4096, "the parameter space that every driver accepts");

}  // namespace flash8
