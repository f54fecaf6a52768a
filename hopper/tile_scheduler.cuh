// Which CTA works on which tile of queries.

#pragma once

#include "params.h"

namespace flash8 {

// kBlockM queries of one head of one sequence.
struct WorkTile {
    int m_block;
    int head;
    int batch;
};

// Persistent CTAs take every num_ctas-th tile. Within a head the last block of queries comes first: under a
// causal mask it sees the most keys, and long work should not start last. Neighbouring CTAs share a head, and
// so its K and V in L2. Producer and consumers walk the same sequence, so nothing needs to be exchanged.
// The host keeps the number of tiles below 2^31.
class StaticTileScheduler {
  public:
    __device__ StaticTileScheduler(ForwardParams const& params)
        : m_blocks_(params.scheduler.max_m_blocks),
          heads_(params.heads_q),
          num_tiles_(m_blocks_ * heads_ * params.sequences.batch),
          index_(blockIdx.x) {}

    __device__ bool done() const { return index_ >= num_tiles_; }

    __device__ WorkTile tile() const {
        int const row = index_ / m_blocks_;
        int const m_block = m_blocks_ - 1 - (index_ - row * m_blocks_);
        int const batch = row / heads_;
        return {m_block, row - batch * heads_, batch};
    }

    __device__ void advance() { index_ += gridDim.x; }

  private:
    int m_blocks_;
    int heads_;
    int num_tiles_;
    int index_;
};

}  // namespace flash8
