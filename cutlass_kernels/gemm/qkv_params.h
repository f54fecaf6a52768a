// The one parameter of the QKV projection, shared by host and device by the rules of hopper/params.h.
//
//     x     = scale_a * scale_b * (A B^T) + bias    fp32, (tokens, (heads_q + 2 heads_kv) * head_dim)
//     q, k  = quantize(position(norm(x)))           norm and position optional, in fp32
//     v     = quantize(x)                           column-major
//
// quantize is that of quantize_params.h with ScaleSource::kTile: a descale for 128 tokens of a head. So are
// the blocks of packed sequences.

#pragma once

#include "../quantize/quantize_params.h"
#include "gemm_params.h"

namespace flash8 {

struct QkvParams {
    // A has a row for each token. Without out, groups, and what follows from the kernel: m_blocks are blocks
    // of tokens, n_blocks are heads.
    GemmParams gemm;

    // e4m3. q and k are (tokens, heads, head_dim), whose tokens are counted over all sequences: batch_stride
    // is unused. v is (batch, heads_kv, head_dim, 128 * blocks), packed without batch; its row_stride steps
    // over head_dim.
    TensorRef q;
    TensorRef k;
    TensorRef v;
    GroupRef q_descale;  // written
    GroupRef k_descale;
    GroupRef v_descale;

    const float* q_norm;  // (head_dim), the weight of RMSNorm over a head; null: no norm
    const float* k_norm;
    const float* rope_cos;  // (rope_rows, rotary_dim / 2), null: no rotary embedding
    const float* rope_sin;
    const std::int32_t* rope_offsets;  // (batch): the position of a sequence's first token; null: 0
    const std::int32_t* cu_seqlens;    // (batch + 1), null: dense
    const std::int32_t* seqused;       // (batch): tokens that count, null: all

    std::int32_t batch;
    std::int32_t seqlen;  // dense: gemm.m is batch * seqlen
    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t rope_rows;
    std::int32_t rotary_dim;
    std::int32_t interleaved;
    float norm_eps;
    std::int32_t reserved[10];  // zero
};

static_assert(kIsPlain<QkvParams> && alignof(QkvParams) == 64);
static_assert(sizeof(QkvParams) <= 4096);

}  // namespace flash8
