// Which keys a block of queries sees: trip counts for the mainloop, and the mask of one tile of scores.
//
// Query i of a sequence has position p = i + seqlen_k - seqlen_q and sees keys from p - window_left to p +
// window_right, and with attention_chunk only those of its own chunk. Both bounds grow with i, so the first
// and the last query of a block give the bounds of the block. KV blocks are visited from right to left in
// three stretches: masked at the right edge, unmasked, masked at the left edge (key_walk.cuh).

#pragma once

#include "params.h"
#include "seqlen_info.cuh"

#include <cstdint>

namespace flash8 {

enum class MaskMode { kNone, kCausal, kLocal };

// KV blocks [begin, end), of which [left_end, right_begin) need no mask.
struct KeyBlocks {
    int begin;
    int left_end;
    int right_begin;
    int end;
    int first_key;  // keys [first_key, end_key) are those that some query of the block sees
    int end_key;

    __device__ bool empty() const { return begin >= end; }
};

// Keys [begin, end) that one query sees; empty when begin >= end.
struct KeyRange {
    int begin;
    int end;
};

// kHidesFirst: the first info.hidden_k keys are not of the sequence, which begins after them.
template <MaskMode kMask, int kBlockM, int kBlockN, bool kPackGqa = false, bool kHidesFirst = false>
class Mask {
    static_assert(!kHidesFirst || kMask == MaskMode::kLocal, "others have no mask at the left edge");

  public:
    template <class Params, class Info>  // SeqlenInfo, with kHidesFirst also hidden_k
    __device__ Mask(Params const& params, Info const& info)
        : seqlen_q_(info.seqlen_q),
          seqlen_k_(info.seqlen_k),
          shift_(info.seqlen_k - info.seqlen_q),
          block_queries_(kPackGqa ? kBlockM / (params.heads_q / params.heads_kv) : kBlockM) {
        if constexpr (kMask == MaskMode::kLocal) {
            // Windows as long as a sequence hold all of it; so none of the sums below overflows.
            left_ = bounded(params.scores.window_left, seqlen_k_);
            right_ = bounded(params.scores.window_right, seqlen_q_);
            // A chunk as long as the sequences already holds all their positions.
            chunk_ = min(params.scores.attention_chunk, max(seqlen_q_, seqlen_k_));
        }
        if constexpr (kHidesFirst) {
            hidden_ = info.hidden_k;
        }
    }

    __device__ KeyBlocks key_blocks(int m_block) const {
        int const first = m_block * block_queries_;
        int const last = min(first + block_queries_, seqlen_q_) - 1;
        if (first > last) {
            return {0, 0, 0, 0, 0, 0};
        }
        KeyRange const head = visible_keys(first);
        KeyRange const tail = visible_keys(last);
        int const first_key = max(0, head.begin);
        int const end_key = max(0, tail.end);
        KeyBlocks blocks{};
        blocks.begin = first_key / kBlockN;
        blocks.left_end = ceil_div(max(0, tail.begin));
        blocks.right_begin = max(0, head.end) / kBlockN;
        blocks.end = ceil_div(end_key);
        blocks.first_key = first_key;
        blocks.end_key = end_key;
        return blocks;
    }

    __device__ KeyRange visible_keys(int query) const {
        KeyRange keys{0, seqlen_k_};
        if constexpr (kMask == MaskMode::kCausal) {
            keys.end = min(keys.end, query + shift_ + 1);
        }
        if constexpr (kMask == MaskMode::kLocal) {
            int const position = query + shift_;
            keys = {position - left_, min(keys.end, position + right_ + 1)};
            if (chunk_ > 0) {
                // Negative where the position is.
                int const remainder = (kHidesFirst ? position - hidden_ : position) % chunk_;
                int const chunk_begin = position - (remainder < 0 ? remainder + chunk_ : remainder);
                keys = {max(keys.begin, chunk_begin), min(keys.end, chunk_begin + chunk_)};
            }
        }
        if constexpr (kHidesFirst) {
            keys.begin = max(keys.begin, hidden_);
        }
        return keys;
    }

    // Hides what is not in `keys` among this thread's scores of block n_block. The thread holds columns
    // 8 * i + c with c = 2 * (lane % 4) + {0, 1}; `scores` are those of one row, (2, kBlockN / 8). The mask
    // is one bit per score, 32 at a time. The compiler moves seven bits at once into predicates, so a score
    // costs one select.
    template <class Row>
    __device__ __forceinline__ static void apply(Row&& scores, KeyRange const& keys, int n_block) {
        int const thread_column = n_block * kBlockN + 2 * static_cast<int>(threadIdx.x % 4);
        int const begin = scores_before(keys.begin - thread_column);
        int const end = scores_before(keys.end - thread_column);
        constexpr int kScores = kBlockN / 4;
#pragma unroll
        for (int first = 0; first < kScores; first += 32) {
            uint32_t visible = ~ones_from(end - first);
            if constexpr (kMask == MaskMode::kLocal) {
                visible &= ones_from(begin - first);
            }
#pragma unroll
            for (int j = first; j < min(first + 32, kScores); ++j) {
                float& score = scores(j % 2, j / 2);
                score = visible >> (j - first) & 1 ? score : -INFINITY;
            }
        }
    }

  private:
    // How many of this thread's scores lie in columns below `column`, counted from its first.
    __device__ __forceinline__ static int scores_before(int column) {
        return column <= 0 ? 0 : 2 * (column / 8) + min(column % 8, 2);
    }

    // All bits from `bit` upwards; a shift by 32 or more leaves none.
    __device__ __forceinline__ static uint32_t ones_from(int bit) {
        uint32_t word;
        asm("shl.b32 %0, %1, %2;" : "=r"(word) : "r"(0xffffffff), "r"(max(bit, 0)));
        return word;
    }

    __device__ static int ceil_div(int keys) { return (keys + kBlockN - 1) / kBlockN; }

    // -1 is unbounded.
    __device__ static int bounded(int window, int all) { return window < 0 ? all : min(window, all); }

    int seqlen_q_;
    int seqlen_k_;
    int shift_;
    int block_queries_;  // queries of a block: with kPackGqa every query has as many rows as a KV head has
                         // heads
    int left_ = 0;
    int right_ = 0;
    int chunk_ = 0;
    int hidden_ = 0;
};

}  // namespace flash8
