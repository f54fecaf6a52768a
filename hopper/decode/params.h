// The one parameter of the decode kernel.

#pragma once

#include "../attention/params.h"
#include "../quantize/append_params.h"

namespace flash8 {

// A KV cache is made of pages: K[page][row][head]. A dense cache is one page a sequence, with its sequences'
// numbers for page numbers; pages.page_table is null then.
struct DecodeParams {
    TensorMap tma_k;  // (head_dim, page_size, heads_kv, num_pages), where the kernel uses TMA
    TensorMap tma_v;

    TensorRef q;   // (batch, seqlen_q, heads_q, head_dim), or packed; 16 bit, or e4m3 over an e4m3 cache
    TensorRef qv;  // as q, head_dim_v: scores are q . k + qv . v. Null where the kernel is not made for it
    TensorRef k;   // (num_pages, page_size, heads_kv, head_dim)
    TensorRef v;   // (num_pages, page_size, heads_kv, head_dim_v)
    TensorRef o;   // as q, head_dim_v
    RowRef lse;    // natural log

    // Of an e4m3 q: per tensor, per (batch, head), or per block of queries.
    DescaleRef q_descale;
    // Per tensor, or per (batch, KV head); by place, where scale_rows is not 0: per (page, KV head, so many
    // rows of the page).
    DescaleRef k_descale;
    DescaleRef v_descale;
    ChannelRef k_mean;  // subtracted from K beforehand: LSE gets softmax_scale * q . k_mean back
    ChannelRef v_mean;  // subtracted from V beforehand: O gets it back, times the weight of the keys

    SequenceParams sequences;  // batch_k: rows of page_table, or of the dense cache; max_seqlen_k: keys that
                               // such a row has room for
    ScoreParams scores;
    PageParams pages;

    float* partials;        // DecodeWorkspace::partials bytes: undefined before and after a launch
    std::int32_t* tickets;  // one per CTA: zero when a kernel starts and zero again when it has ended

    // (batch, seqlen_q), or (total_q): bit n of a query's word is whether it sees the n-th of the sequence's
    // last seqlen_q keys, at most 32. Null: it does, as far as the mask lets it.
    const std::uint32_t* tree_mask;
    std::int64_t tree_mask_stride;  // of a sequence

    // (batch + 1), or null: which pieces of work each sequence has (scheduler_metadata.cuh). Any contents
    // will do: wrong ones are noticed.
    const std::int32_t* scheduler_metadata;

    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
    std::int32_t k_scale_rows;  // a power of two, where the kernel is made for it
    std::int32_t v_scale_rows;
    std::int32_t q_is_e4m3;            // 1: the kernel is one for e4m3 caches
    std::int32_t heads_per_q_descale;  // query heads that share one, where there is one
    std::int32_t split_keys;           // keys of a split, whose boundaries are fixed; 0: equal shares
    std::int32_t reserved[1];          // zero: the next one is where 64 bytes begin

    // Where the kernel is made for it: Q, and the new rows of K and V. Lengths are those before them.
    AppendParams append;
    std::int32_t zero[14];  // fills the struct up to its 64-byte alignment
};

static_assert(kIsPlain<DecodeParams> && alignof(DecodeParams) == 64);
static_assert(sizeof(DecodeParams) <= 4096, "the parameter space that every driver accepts");

}  // namespace flash8
