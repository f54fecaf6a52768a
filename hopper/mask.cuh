// Which keys a block of queries sees: trip counts for the mainloop, and the mask of one tile of scores.
//
// Query i of a sequence stands at position p = i + seqlen_k - seqlen_q and sees keys from p - window_left to
// p + window_right. KV blocks run from right to left in three stretches: masked at the right edge, unmasked,
// masked at the left edge.

#pragma once

#include "params.h"
#include "seqlen_info.cuh"

#include <cutlass/numeric_types.h>

namespace flash8 {

enum class MaskMode : int { kNone = 0, kCausal = 1, kLocal = 2 };

// KV blocks [begin, end), of which [left_end, right_begin) need no mask.
struct KeyBlocks {
    int begin;
    int left_end;
    int right_begin;
    int end;

    __device__ bool empty() const { return begin >= end; }
};

template <MaskMode kMask, int kBlockM, int kBlockN>
class Mask {
  public:
    __device__ Mask(ForwardParams const& params, SeqlenInfo const& info)
        : seqlen_k_(info.seqlen_k),
          shift_(info.seqlen_k - info.seqlen_q),
          left_(params.scores.window_left < 0 ? info.seqlen_q + info.seqlen_k : params.scores.window_left),
          right_(kMask == MaskMode::kCausal       ? 0
                 : params.scores.window_right < 0 ? info.seqlen_q + info.seqlen_k
                                                  : params.scores.window_right),
          seqlen_q_(info.seqlen_q) {}

    __device__ KeyBlocks key_blocks(int m_block) const {
        int const first = m_block * kBlockM;
        int const last = min(first + kBlockM, seqlen_q_) - 1;
        if (first > last) {
            return {0, 0, 0, 0};
        }
        KeyBlocks blocks{0, 0, seqlen_k_ / kBlockN, ceil_div(seqlen_k_)};
        if constexpr (kMask != MaskMode::kNone) {
            blocks.end = min(blocks.end, ceil_div(max(0, last + shift_ + right_ + 1)));
            blocks.right_begin = min(blocks.right_begin, max(0, first + shift_ + right_ + 1) / kBlockN);
        }
        if constexpr (kMask == MaskMode::kLocal) {
            blocks.begin = max(0, first + shift_ - left_) / kBlockN;
            blocks.left_end = ceil_div(max(0, last + shift_ - left_));
        }
        return blocks;
    }

    // Hides what row `query` must not see in this thread's scores of block n_block. The thread holds columns
    // 8 * i + c with c = 2 * (lane % 4) + {0, 1}; `scores` are those of one row, (2, kBlockN / 8).
    template <class Row>
    __device__ __forceinline__ void apply(Row&& scores, int query, int n_block) const {
        int const thread_column = n_block * kBlockN + 2 * static_cast<int>(threadIdx.x % 4);
        int const position = query + shift_;
        int end = seqlen_k_;
        if constexpr (kMask != MaskMode::kNone) {
            end = min(end, position + right_ + 1);
        }
        int const hidden_from = end - thread_column;
        int const hidden_before = position - left_ - thread_column;
#pragma unroll
        for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool hidden = 8 * i + c >= hidden_from;
                if constexpr (kMask == MaskMode::kLocal) {
                    hidden = hidden || 8 * i + c < hidden_before;
                }
                scores(c, i) = hidden ? -INFINITY : scores(c, i);
            }
        }
    }

  private:
    __device__ static int ceil_div(int keys) { return (keys + kBlockN - 1) / kBlockN; }

    int seqlen_k_;
    int shift_;
    int left_;
    int right_;
    int seqlen_q_;
};

}  // namespace flash8
