// Online softmax of one warpgroup's 64 rows. A thread holds two rows (r = 0, 1), eight rows apart, and a
// quarter of their columns; the four threads of a quad share a row.

#pragma once

#include "../arch/ptx.cuh"

#include <cute/tensor_impl.hpp>

namespace flash8 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kRowsPerThread = 2;

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// The results of a thread's rows after the last tile.
struct RowStatistics {
    float normalise[kRowsPerThread];  // factor of O; 0 if the row has seen no key
    float weight[kRowsPerThread];     // of the keys, as opposed to the sink
    float lse[kRowsPerThread];        // natural log
};

// row_sum holds this thread's part of the sum of 2^(s - reference); maximum is that of the scores, in log2
// units like reference. A sink (natural log, -inf: none) is one more logit without a value.
__device__ inline RowStatistics finish_rows(float const (&reference)[kRowsPerThread],
                                            float const (&maximum)[kRowsPerThread],
                                            float const (&row_sum)[kRowsPerThread],
                                            float const (&sink)[kRowsPerThread]) {
    RowStatistics rows;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
        float const logit = sink[r] * kLog2E;
        float const top = fmaxf(maximum[r], logit);
        float const safe = top == -INFINITY ? 0.0f : top;
        float const factor = ptx::exp2(reference[r] - safe);
        float const sum = quad_sum(row_sum[r]) * factor;
        float const total = sum + ptx::exp2(logit - safe);
        bool const empty = total == 0.0f;
        rows.normalise[r] = empty ? 0.0f : factor / total;
        rows.weight[r] = empty ? 0.0f : sum / total;
        rows.lse[r] = empty ? -INFINITY : (safe + ptx::log2(total)) * kLn2;
    }
    return rows;
}

class OnlineSoftmax {
  public:
    // Scores are multiplied by scale_log2 = softmax_scale * log2(e) inside the exponential.
    __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {}

    // Turns a tile of scores (row, (2, kBlockN / 8)) into P in place. Returns in `alpha` what everything
    // accumulated so far must be multiplied by. With kMayBeEmpty a row may have seen no key yet.
    template <bool kFirst, bool kMayBeEmpty, class Exponentials, class Scores>
    __device__ __forceinline__ void step(Scores&& scores, float (&alpha)[kRowsPerThread]) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            float const previous = row_max_[r];
            float maximum = kFirst ? -INFINITY : previous;
#pragma unroll
            for (int i = 0; i < cute::size<1>(scores); ++i) {
                maximum = fmaxf(maximum, scores(r, i));
            }
            maximum = quad_max(maximum);
            row_max_[r] = maximum;
            float const scaled = maximum * scale_log2_;
            float const offset = kMayBeEmpty && scaled == -INFINITY ? 0.0f : scaled;
            // From the rounded offset that P was made with: large scores make the difference matter.
            alpha[r] = kFirst ? 1.0f : ptx::exp2(row_max_log2_[r] - offset);
            row_max_log2_[r] = scaled;
            float sum = kFirst ? 0.0f : row_sum_[r] * alpha[r];
#pragma unroll
            for (int i = 0; i < cute::size<1>(scores); ++i) {
                scores(r, i) = Exponentials::exp2(i, scores(r, i) * scale_log2_ - offset);
                sum += scores(r, i);
            }
            row_sum_[r] = sum;
        }
    }

    __device__ RowStatistics finish(float const (&sink)[kRowsPerThread]) const {
        return finish_rows(row_max_log2_, row_max_log2_, row_sum_, sink);
    }

  private:
    float scale_log2_;
    float row_max_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_max_log2_[kRowsPerThread] = {-INFINITY, -INFINITY};  // times scale_log2_, rounded
    float row_sum_[kRowsPerThread] = {0.0f, 0.0f};
};

}  // namespace flash8
