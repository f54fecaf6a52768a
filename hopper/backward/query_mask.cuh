// Which queries see a block of keys: the converse of hopper/attention/mask.cuh, whose visible_keys it
// mirrors.
//
// Both bounds grow with the key, so the first and the last key of a block tell everything about it. Blocks of
// queries run upwards in three stretches: masked at the first queries that see some key, unmasked, masked
// where a window ends.

#pragma once

#include "../attention/mask.cuh"

namespace flash8 {

// Blocks of queries [begin, end), of which [left_end, right_begin) need no mask.
struct QueryBlocks {
    int begin;
    int left_end;
    int right_begin;
    int end;

    __device__ bool empty() const { return begin >= end; }
};

// Queries [begin, end) that see one key.
struct QueryRange {
    int begin;
    int end;
};

template <MaskMode kMask, int kBlockM, int kBlockN>
class QueryMask {
  public:
    __device__ QueryMask(ScoreParams const& scores, SeqlenInfo const& info)
        : seqlen_q_(info.seqlen_q), seqlen_k_(info.seqlen_k), shift_(info.seqlen_k - info.seqlen_q) {
        if constexpr (kMask == MaskMode::kLocal) {
            // As in Mask: so none of the sums below overflows.
            left_ = bounded(scores.window_left, seqlen_k_);
            right_ = bounded(scores.window_right, seqlen_q_);
            chunk_ = min(scores.attention_chunk, max(seqlen_q_, seqlen_k_));
        }
    }

    __device__ QueryBlocks query_blocks(int n_block) const {
        int const first = n_block * kBlockN;
        int const last = min(first + kBlockN, seqlen_k_) - 1;
        if (first > last || seqlen_q_ == 0) {
            return {0, 0, 0, 0};
        }
        QueryRange const head = visible_queries(first);
        QueryRange const tail = visible_queries(last);
        QueryBlocks blocks{};
        blocks.begin = max(0, head.begin) / kBlockM;
        blocks.end = ceil_div(max(0, min(tail.end, seqlen_q_)));
        bool const ragged = last + 1 < first + kBlockN;
        // Under a causal mask no query sees the keys past the last one, whose block is its diagonal one.
        if (kMask != MaskMode::kCausal && ragged) {
            blocks.left_end = blocks.right_begin = blocks.end;
        } else {
            int const all = kMask == MaskMode::kCausal ? first + kBlockN - 1 - shift_ : tail.begin;
            blocks.left_end = min(ceil_div(max(0, all)), blocks.end);
            // Queries past the last one have an LSE of +inf and need no mask.
            blocks.right_begin = head.end >= seqlen_q_ ? blocks.end : max(0, head.end) / kBlockM;
        }
        return blocks;
    }

    __device__ QueryRange visible_queries(int key) const {
        QueryRange queries{0, seqlen_q_};
        if constexpr (kMask == MaskMode::kCausal) {
            queries.begin = key - shift_;
        }
        if constexpr (kMask == MaskMode::kLocal) {
            queries = {key - shift_ - right_, min(seqlen_q_, key - shift_ + left_ + 1)};
            if (chunk_ > 0) {
                int const chunk_begin = key - key % chunk_ - shift_;
                queries = {max(queries.begin, chunk_begin), min(queries.end, chunk_begin + chunk_)};
            }
        }
        return queries;
    }

  private:
    __device__ static int ceil_div(int queries) { return (queries + kBlockM - 1) / kBlockM; }

    // -1 is unbounded.
    __device__ static int bounded(int window, int all) { return window < 0 ? all : min(window, all); }

    int seqlen_q_;
    int seqlen_k_;
    int shift_;
    int left_ = 0;
    int right_ = 0;
    int chunk_ = 0;
};

}  // namespace flash8
