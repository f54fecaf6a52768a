// ALiBi: a score falls with the distance between its query and its key.

#pragma once

#include "params.h"
#include "softmax.cuh"

namespace flash8 {

// What one row subtracts from its scores: slope * |position - key|, position = query + seqlen_k - seqlen_q.
// The slope is in the units that the scores have afterwards.
struct AlibiRow {
    float slope;
    int position;

    // The slope is given in logits; `unit` is how many logits one unit of the scores is.
    __device__ static AlibiRow read(ScoreParams const& scores, int batch, int head, int position,
                                    float unit) {
        float const slope = scores.alibi_slopes[batch * scores.alibi_batch_stride + head];
        return {slope / unit, position};
    }

    // `scale` brings the scores to the units of the slope. Columns as in Mask::apply.
    template <int kBlockN, class Row>
    __device__ __forceinline__ void apply(Row&& scores, int n_block, float scale) const {
        int const thread_column = n_block * kBlockN + 2 * static_cast<int>(threadIdx.x % 4);
        float const distance = static_cast<float>(position - thread_column);  // exact below 2^24
#pragma unroll
        for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float const penalty = slope * fabsf(distance - static_cast<float>(8 * i + c));
                scores(c, i) = scores(c, i) * scale - penalty;
            }
        }
    }
};

}  // namespace flash8
