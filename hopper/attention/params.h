// What the params of every attention kernel share. By the rules of hopper/params.h.

#pragma once

#include "../params.h"

namespace flash8 {

// Where sequences lie. Any pointer may be null; null cu_seqlens means a dense tensor.
struct SequenceParams {
    const std::int32_t* cu_seqlens_q;  // (batch + 1): rows of sequence b are [cu[b], cu[b+1])
    const std::int32_t* cu_seqlens_k;  // (batch + 1)
    const std::int32_t* seqused_q;     // (batch): rows really used, from the start of the sequence
    const std::int32_t* seqused_k;     // (batch): keys really used, counted with the left padding
    const std::int32_t* leftpad_k;     // (batch): keys to skip at the start
    const std::int32_t* kv_batch_idx;  // (batch): which sequence of the cache to read
    std::int64_t total_q;              // rows of Q over all sequences
    std::int64_t total_k;
    std::int32_t batch;         // sequences of Q
    std::int32_t batch_k;       // sequences of K/V: more than batch with kv_batch_idx
    std::int32_t max_seqlen_q;  // the length when dense, an upper bound otherwise
    std::int32_t max_seqlen_k;
};

// A paged KV cache, K[page][row][head]. A sequence's row of page_table has the numbers of its pages.
struct PageParams {
    const std::int32_t* page_table;  // (batch_k, max_pages), or null
    std::int64_t page_table_stride;
    std::int32_t page_size;
    std::int32_t num_pages;
    std::int32_t max_pages;  // columns of page_table
    std::int32_t box_rows;   // rows of a page that one TMA instruction loads
    // position / page_size = position * page_multiplier >> page_shift, for positions below 2^31
    std::uint32_t page_multiplier;
    std::int32_t page_shift;
};

// S = softmax_scale * q.k, then softcap, then ALiBi, then the mask, then softmax with the sink.
struct ScoreParams {
    const float* sinks;               // (heads_q) natural log, or null: one more logit without a value
    const float* alibi_slopes;        // (heads_q) or (batch, heads_q), or null
    std::int64_t alibi_batch_stride;  // 0 when the slopes are shared by the batch
    float softmax_scale;
    float softmax_scale_log2;      // softmax_scale * log2(e)
    float softcap;                 // 0 is off
    std::int32_t window_left;      // -1 is unbounded
    std::int32_t window_right;     // -1 is unbounded; 0 when causal
    std::int32_t attention_chunk;  // 0 is off
};

// Which probabilities are kept (dropout.cuh), for kernels that are compiled with dropout.
struct DropoutParams {
    const std::int64_t* seed;  // (1), read when the kernel runs; null without dropout
    std::uint32_t threshold;   // round(p * 65536), of the 65536 values of a half word
    float keep_scale;          // 65536 / (65536 - threshold), or 0 where all is dropped
};

// Work distribution. The counters are zero when a kernel starts and zero again when it has ended.
struct SchedulerParams {
    std::int32_t*
        tile_count;  // two counters: tiles that the dynamic scheduler has handed out, CTAs that are done
    std::int32_t max_m_blocks;       // over the batch, in tiles of kBlockM times the cluster
    std::int32_t heads_per_section;  // (batch, head) pairs whose KV fits in L2 together
    std::int32_t num_ctas;           // persistent CTAs, without those of sm_margin
    std::int32_t longest_first;      // whether packed sequences with many keys come first; the forward's
};

}  // namespace flash8
