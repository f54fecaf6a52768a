// The softmax of one warpgroup's 64 rows where P is e4m3: as in softmax.cuh, but the reference belongs to the
// block of keys, so that P uses all of e4m3 wherever the largest score stands. In log2 units:
//
//   m_ref = max(m_block, row_max - kGrowth)
//   P     = 2^(s - m_ref + kOffset)
//
// and what is accumulated is rescaled by 2^(m_ref_before - m_ref), at most 2^kGrowth. row_sum adds the P of
// fp32, not the rounded one; the offset is taken back in LSE.

#pragma once

#include "exp2.cuh"
#include "softmax.cuh"

namespace flash8 {

class BlockLocalSoftmax {
    static constexpr float kOffset = 8.0f;  // the largest P is 2^8, under e4m3's 448
    static constexpr float kGrowth = 24.0f;

  public:
    // Turns a tile of scores (row, (2, kBlockN / 8)) into P in place. scale_log2: what makes the scores
    // of a row log2 units. Returns in `alpha` what everything accumulated so far must be multiplied by: 0
    // before the first tile. With kMayBeEmpty a row may have seen no key yet. Every kPolynomialEvery-th
    // exponential is a polynomial, which relieves the special function unit; 0 is none.
    template <bool kMayBeEmpty, int kPolynomialEvery, class Scores>
    __device__ __forceinline__ void step(Scores&& scores, float const (&scale_log2)[kRowsPerThread],
                                         float (&alpha)[kRowsPerThread]) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            float block_max = scores(r, 0);
#pragma unroll
            for (int i = 1; i < cute::size<1>(scores); ++i) {
                block_max = fmaxf(block_max, scores(r, i));
            }
            block_max = quad_max(block_max) * scale_log2[r];
            row_max_[r] = fmaxf(row_max_[r], block_max);
            float const reference = fmaxf(block_max, row_max_[r] - kGrowth);
            float const shift = kMayBeEmpty && reference == -INFINITY ? 0.0f : reference;
            alpha[r] = ptx::exp2(reference_[r] - shift);
            reference_[r] = reference;
            float const offset = kOffset - shift;
            float sum = row_sum_[r] * alpha[r];
#pragma unroll
            for (int i = 0; i < cute::size<1>(scores); ++i) {
                float const exponent = scores(r, i) * scale_log2[r] + offset;
                bool const polynomial = kPolynomialEvery > 0 && (i + 1) % max(kPolynomialEvery, 1) == 0;
                scores(r, i) = polynomial ? exp2_polynomial(exponent) : ptx::exp2(exponent);
                sum += scores(r, i);
            }
            row_sum_[r] = sum;
        }
    }

    __device__ RowStatistics finish(float const (&sink)[kRowsPerThread]) const {
        return finish_rows(reference_, row_max_, row_sum_, kOffset, sink);
    }

  private:
    float reference_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_max_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_sum_[kRowsPerThread] = {0.0f, 0.0f};
};

}  // namespace flash8
