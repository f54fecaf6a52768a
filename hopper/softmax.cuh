// Online softmax of one warpgroup's 64 rows. A thread holds two rows (r = 0, 1), eight rows apart, and a
// quarter of their columns; the four threads of a quad share a row.

#pragma once

#include "ptx.cuh"

#include <cute/tensor.hpp>

namespace flash8 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kRowsPerThread = 2;

class OnlineSoftmax {
  public:
    // Scores are multiplied by scale_log2 = softmax_scale * log2(e) inside the exponential.
    __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {}

    // Turns a tile of scores (row, (2, kBlockN / 8)) into P in place. Returns in `alpha` what everything
    // accumulated so far must be multiplied by. With kMayBeEmpty a row may have seen no key yet.
    template <bool kFirst, bool kMayBeEmpty, class Scores>
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
            float const reference = kMayBeEmpty && maximum == -INFINITY ? 0.0f : maximum;
            float const offset = reference * scale_log2_;
            alpha[r] = kFirst ? 1.0f : ptx::exp2(previous * scale_log2_ - offset);
            float sum = kFirst ? 0.0f : row_sum_[r] * alpha[r];
#pragma unroll
            for (int i = 0; i < cute::size<1>(scores); ++i) {
                scores(r, i) = ptx::exp2(scores(r, i) * scale_log2_ - offset);
                sum += scores(r, i);
            }
            row_sum_[r] = sum;
        }
    }

    // After the last tile: the factor that normalises each row of O, and its LSE (natural log). A sink is one
    // more logit without a value; -inf is none.
    __device__ void finish(float const (&sinks)[kRowsPerThread], float (&normalise)[kRowsPerThread],
                           float (&lse)[kRowsPerThread]) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            float const sum = quad_sum(row_sum_[r]);
            float const maximum = row_max_[r] * scale_log2_;  // log2 units from here on
            float reference = maximum;
            float total = sum;
            normalise[r] = 1.0f;
            if (sinks[r] != -INFINITY) {
                float const logit = sinks[r] * kLog2E;
                reference = fmaxf(maximum, logit);
                float const safe = reference == -INFINITY ? 0.0f : reference;
                normalise[r] = ptx::exp2(maximum - safe);
                total = sum * normalise[r] + ptx::exp2(logit - safe);
            }
            bool const empty = total == 0.0f;
            normalise[r] = empty ? 0.0f : normalise[r] / total;
            lse[r] = empty ? -INFINITY : (reference + ptx::log2(total)) * kLn2;
        }
    }

  private:
    __device__ __forceinline__ static float quad_max(float x) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
        return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
    }

    __device__ __forceinline__ static float quad_sum(float x) {
        x += __shfl_xor_sync(0xffffffff, x, 1);
        return x + __shfl_xor_sync(0xffffffff, x, 2);
    }

    float scale_log2_;
    float row_max_[kRowsPerThread] = {-INFINITY, -INFINITY};
    float row_sum_[kRowsPerThread] = {0.0f, 0.0f};
};

}  // namespace flash8
