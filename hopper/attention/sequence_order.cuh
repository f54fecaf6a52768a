// In which order a kernel walks packed sequences, for PackedTiles: 32 at a time, from first_batch() on.

#pragma once

#include "../arch/ptx.cuh"
#include "params.h"

namespace flash8 {

// In the order of the batch.
template <class Params>
class BatchOrder {
  public:
    // Where a walk begins, or goes on.
    __device__ explicit BatchOrder(Params const& params, int place = 0) : params_(params), place_(place) {}

    __device__ int place() const { return place_; }
    __device__ int first_batch() const { return place_; }

    // Whether the walk comes upon the sequence now.
    __device__ bool has(int) const { return true; }

    // False after the last sequence.
    __device__ bool advance() {
        place_ += 32;
        return place_ < params_.sequences.batch;
    }

  private:
    Params const& params_;
    int place_;
};

// Sequences with many keys first, if the host wants it, so that no CTA starts on a long one while others end:
// through the batch once for each class of lengths that there is in it, the longest first. In a class the
// blocks of keys of one sequence are at most twice those of another, and it keeps the order of the batch.
//
// A class follows from the sequence's own offsets. So the walk comes upon each sequence once, whatever the
// tensors hold: order is all that wrong lengths cost.
template <class Params>
class LongestFirst {
    static constexpr unsigned kBlock = 128;  // about kBlockN: what is shorter takes as long

  public:
    // By a whole warp.
    __device__ explicit LongestFirst(Params const& params)
        : params_(params), place_(wanted() ? longest_below(32) : 0) {}
    __device__ LongestFirst(Params const& params, int place) : params_(params), place_(place) {}

    __device__ int place() const { return place_; }
    __device__ int first_batch() const { return place_ & ~31; }

    __device__ bool has(int batch) const { return !wanted() || class_of(batch) == current_class(); }

    // By a whole warp.
    __device__ bool advance() {
        place_ += 32;
        if (first_batch() < params_.sequences.batch) {
            return true;
        }
        place_ = wanted() ? longest_below(current_class()) : -1;
        return place_ >= 0;
    }

  private:
    __device__ bool wanted() const { return params_.scheduler.longest_first != 0; }
    __device__ int current_class() const { return place_ & 31; }

    // The class of the longest sequences of those below `bound`; negative without any.
    __device__ int longest_below(int bound) const {
        int longest = -1;
#pragma unroll 1  // or the producer warp lacks registers
        for (int batch = ptx::lane_index(); batch < params_.sequences.batch; batch += 32) {
            int const found = class_of(batch);
            longest = found < bound ? max(longest, found) : longest;
        }
        return __reduce_max_sync(0xffffffff, longest);
    }

    // The power of two in the blocks of keys, up to 25.
    __device__ int class_of(int batch) const {
        auto const& sequences = params_.sequences;
        unsigned keys = 0;
        if (sequences.seqused_k != nullptr) {
            keys = sequences.seqused_k[batch];
        } else if (sequences.cu_seqlens_k != nullptr) {
            // Wraps around where offsets are far apart.
            keys = static_cast<unsigned>(sequences.cu_seqlens_k[batch + 1]) - sequences.cu_seqlens_k[batch];
        }
        return 31 - __clz((keys + kBlock - 1) / kBlock | 1);
    }

    Params const& params_;
    int place_;  // the first of the 32 sequences, and in the lower five bits the class
};

}  // namespace flash8
