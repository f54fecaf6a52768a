// The one parameter of the forward kernel.

#pragma once

#include "../attention/params.h"

namespace flash8 {

// Values of O that share a scale where O is e4m3.
inline constexpr int kOutScaleChannels = 128;

// The scales of an e4m3 O, O ~ scale * stored. The kernel writes one for every 128 channels of a row,
// (batch * seqlen_q, heads_q, head_dim_v / 128), or all of O has the one that is given.
struct OutScaleRef {
    float* ptr;               // written; null: `given` counts
    const float* given;       // (1)
    std::int64_t row_stride;  // from one query to the next, over all sequences
};

struct ForwardParams {
    TensorMap tma_q;
    TensorMap tma_k;
    TensorMap tma_v;

    TensorRef q;  // (batch, seqlen_q, heads_q, head_dim)
    TensorRef k;  // (batch_k, seqlen_k, heads_kv, head_dim), or with KernelInfo::paged
                  // (num_pages, page_size, heads_kv, head_dim)
    TensorRef v;  // likewise, head_dim_v; or with KernelInfo::v_colmajor
                  // (batch_k, heads_kv, head_dim_v, 128 * blocks), where row_stride steps over head_dim_v
    TensorRef o;  // (batch, seqlen_q, heads_q, head_dim_v); e4m3 with KernelInfo::out_e4m3
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
    ElementType o_type;  // of FP8 inputs kFloat16 or kBfloat16; with KernelInfo::out_e4m3 kUint8
    std::int32_t heads_per_q_descale;  // query heads that share a descale: 1, or heads_q / heads_kv
    DropoutParams dropout;
    PageParams pages;       // of a kernel that reads pages; sequences.batch_k is the rows of page_table
    OutScaleRef out_scale;  // with KernelInfo::out_e4m3
};

static_assert(kIsPlain<ForwardParams> && alignof(ForwardParams) == 64);
static_assert(sizeof(ForwardParams) <= 4096, "the parameter space that every driver accepts");

}  // namespace flash8
