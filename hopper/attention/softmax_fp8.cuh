// The softmax of one warpgroup's 64 rows where P is e4m3: as in softmax.cuh, but the reference belongs to the
// block of keys, so that P uses the whole range of e4m3 in every block. In log2 units:
//
//   reference = max(m_block, row_max - kGrowth) - kOffset
//   P         = 2^(s - reference)
//
// and what is accumulated is rescaled by 2^(reference_before - reference), at most 2^kGrowth. row_sum adds
// the P of fp32, not the rounded one. How the reference is rounded does not matter, since P, the rescaling
// and LSE take the same one.

#pragma once

#include "softmax.cuh"

namespace flash8 {

class BlockLocalSoftmax {
    static constexpr float kOffset = 8.0f;  // the largest P is 2^8, under e4m3's 448
    static constexpr float kGrowth = 24.0f;

  public:
    // In log2 units. The product of a score and scale_log2 is rounded, and that shifts the exponent of the
    // largest P, so e4m3 P too, but not row_sum. From kExact on, `step` with kAnySize takes a scale of ten
    // bits: the scores have 14 bits, as FP8's accumulator does, so their products are exact. Tiles whose
    // scores may reach kLargest need that step. From kNoOffset on, scores differ by more than e4m3 can
    // express, and the reference soon has no bits left for the offset.
    static constexpr float kExact = 65536.0f;
    static constexpr float kLargest = 262144.0f;
    static constexpr float kNoOffset = 4194304.0f;

    // Turns a tile of scores (row, (2, kBlockN / 8)) into P in place. scale_log2: what makes the scores
    // of a row log2 units. Returns in `alpha` what everything accumulated so far must be multiplied by: 0
    // before the first tile. With kMayBeEmpty a row may have seen no key yet.
    template <bool kMayBeEmpty, bool kAnySize, class Exponentials, class Scores>
    __device__ __forceinline__ void step(Scores&& scores, float const (&scale_log2)[kRowsPerThread],
                                         float (&alpha)[kRowsPerThread]) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            float top = scores(r, 0);
#pragma unroll
            for (int i = 1; i < cute::size<1>(scores); ++i) {
                top = fmaxf(top, scores(r, i));
            }
            top = quad_max(top);
            float const block_max = top * scale_log2[r];
            row_max_[r] = fmaxf(row_max_[r], block_max);
            float const largest = fmaxf(block_max, row_max_[r] - kGrowth);
            float reference = (kMayBeEmpty && largest == -INFINITY ? 0.0f : largest) - kOffset;
            float factor = scale_log2[r];
            float shift = reference;
            if constexpr (kAnySize) {
                float const size = fabsf(largest);
                if (size >= kExact && size < INFINITY && largest == block_max) {
                    float const offset = size < kNoOffset ? kOffset : 0.0f;
                    factor = ten_bits(factor);
                    shift = top * factor - offset;
                    reference = largest - offset;
                }
            }
            alpha[r] = ptx::exp2(reference_[r] - reference);
            reference_[r] = kMayBeEmpty && largest == -INFINITY ? -INFINITY : reference;
            float sum = row_sum_[r] * alpha[r];
#pragma unroll
            for (int i = 0; i < cute::size<1>(scores); ++i) {
                scores(r, i) = Exponentials::exp2(i, __fmaf_rn(scores(r, i), factor, -shift));
                sum += scores(r, i);
            }
            row_sum_[r] = sum;
        }
    }

    __device__ RowStatistics finish(float const (&sink)[kRowsPerThread]) const {
        return finish_rows(reference_, row_max_, row_sum_, sink);
    }

  private:
    __device__ __forceinline__ static float ten_bits(float scale) {
        return __uint_as_float(__float_as_uint(scale) & 0xffffc000);
    }

    float reference_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_max_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_sum_[kRowsPerThread] = {0.0f, 0.0f};
};

}  // namespace flash8
