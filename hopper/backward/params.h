// The one parameter of the three kernels of the backward, which run one after the other on one stream:
//
//   preprocess.cu   one CTA per block of kBlockM queries of a query head: row_stats, and zeros in dq_accum
//   kernel.cu       one CTA per block of kBlockN keys of a KV head: dK, dV, and its share of dq_accum; with
//                   head_splits so many CTAs, which share out the query heads
//   postprocess.cu  one CTA per block of kBlockM queries of a query head: dQ from dq_accum; with head_splits
//                   one more per block of keys of a KV head: dK and dV from dkv_partial
//
// kBlockM and kBlockN are those of kernel.cu's kernel_info; all three kernels are compiled for the same
// tiles.
//
// Blocks of queries. A sequence starts at a block of its own: dense sequence b at block
// b * scheduler.max_m_blocks, packed sequence b at block cu_seqlens_q[b] / kBlockM + b. So there are
//
//   query_blocks = batch * ceil(max_seqlen_q / kBlockM)   (dense)   or   total_q / kBlockM + batch   (packed)
//
//   key_blocks   = batch * ceil(max_seqlen_k / kBlockN)   (dense)   or   total_k / kBlockN + batch   (packed)
//
// and the workspace is linear in tokens. Nothing in it needs to be initialised:
//
//   row_stats        heads_q * query_blocks * 2 * kBlockM floats; FP8: 3 * kBlockM + 4 (row_stats.cuh)
//   dq_accum         heads_q * query_blocks * kBlockM * kHeadDim floats (kHeadDim of kernel_info)
//   dq_semaphore     heads_q * query_blocks int32, for a deterministic kernel only
//   dsinks_partial   heads_q * query_blocks floats, with sinks only
//   dkv_partial      heads_kv * key_blocks * head_splits * kBlockN * (kHeadDim + kHeadDimV) floats, if
//                    head_splits is above 1
//   q16              heads_q * query_blocks * kBlockM * kHeadDim 16-bit numbers, FP8 only
//   key_mean         batch * heads_kv * kHeadDim floats, FP8 only, batch outermost
//
// each aligned to 128 bytes, with heads outermost, then blocks, then splits.
//
// Grids, one-dimensional: heads_q * query_blocks CTAs for preprocess and postprocess, heads_kv * head_splits
// * key_blocks for the kernel. With head_splits postprocess has heads_kv * key_blocks CTAs more, the last
// ones.
//
// leftpad_k and kv_batch_idx are null. Without queries, query_blocks = 0, nothing writes dsinks; without
// keys, no launch of the kernel is needed.

#pragma once

#include "../attention/params.h"

namespace flash8 {

struct BackwardParams {
    TensorMap tma_q;     // kernel_info.tma[0] of kernel.cu; the other two kernels use no map
    TensorMap tma_k;     // tma[1]
    TensorMap tma_v;     // tma[2]
    TensorMap tma_dout;  // tma[3]

    TensorRef q;        // (batch, seqlen_q, heads_q, head_dim); with descales q, k and v are e4m3
    TensorRef k;        // (batch, seqlen_k, heads_kv, head_dim)
    TensorRef v;        // (batch, seqlen_k, heads_kv, head_dim_v)
    TensorRef o;        // (batch, seqlen_q, heads_q, head_dim_v)
    TensorRef dout;     // like o
    TensorRef dq;       // like q; every row is written, with zero where it is not used
    TensorRef dk;       // like k; every row is written
    TensorRef dv;       // like v; every row is written
    RowRef lse;         // of the forward, natural log
    RowRef dlse;        // null: zero
    ChannelRef k_mean;  // (batch, heads_kv, head_dim), or null: subtracted from K (key_mean.cuh); FP8:
                        // subtracted from K beforehand, and in LSE (fp8_operands.cuh)
    ChannelRef v_mean;  // FP8: subtracted from V beforehand, and in O

    DescaleRef q_descale;  // FP8, and so are the next two
    DescaleRef k_descale;
    DescaleRef v_descale;

    float* row_stats;            // of a block: kBlockM times LSE in log2 units, +inf where a row is not used
                                 // or sees no key, then kBlockM times D = rowsum(dO * O) - dLSE
    float* dq_accum;             // of a block: kBlockM x kHeadDim sums, in the order of the accumulators
    std::int32_t* dq_semaphore;  // of a block: how many blocks of keys have added their share
    float* dsinks_partial;       // of a block: what its rows add to dsinks
    float* dsinks;               // (heads_q), or null
    float* dkv_partial;          // of a block of keys and a split: kBlockN x kHeadDim sums of dK, then
                                 // kBlockN x kHeadDimV of dV, in the order of the accumulators
    void* q16;                   // FP8, of a block: Q in 16 bits, as shared memory has it
    float* key_mean;             // FP8, of a KV head of a sequence: what is taken off K for dQ

    SequenceParams sequences;
    ScoreParams scores;
    SchedulerParams scheduler;  // max_m_blocks (of kBlockM queries) and heads_per_section; the rest is zero
    DropoutParams dropout;

    std::int64_t query_blocks;
    std::int64_t key_blocks;
    std::int32_t max_n_blocks;  // over the batch, of kBlockN keys
    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
    std::int32_t head_splits;  // CTAs that share the query heads of a KV head: 1 up to heads_q / heads_kv
    std::int32_t heads_per_q_descale;  // query heads that share a descale: 1, or heads_q / heads_kv
    std::int32_t zero;                 // is zero, which the compiler must not know
    std::int32_t reserved[10];         // zero: fills the struct up to its 64-byte alignment
};

static_assert(kIsPlain<BackwardParams> && alignof(BackwardParams) == 64);
static_assert(sizeof(BackwardParams) <= 4096, "the parameter space that every driver accepts");

}  // namespace flash8
