// Where a consumer warpgroup leaves its part of dQ.

#pragma once

#include "config.cuh"

namespace flash8 {

// Staged in shared memory, from where one thread of the producer warpgroup adds it to the workspace, or added
// by its own threads.
template <class Config>
class DqStore {
    using Tiles = typename Config::Tiles;
    static constexpr int kVectors = Config::kDqColumns / 8;  // of a thread's accumulators of a slice

  public:
    __device__ __forceinline__ DqStore(BackwardParams const& params, SharedStorage<Config>& shared,
                                       int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {
        if constexpr (!Config::kStageDq) {
            KeyTile const& tile = shared.tile;
            int64_t const block =
                tile.first_head * params.query_blocks + tile.first_query_block + tile.blocks.begin;
            float* const part = params.dq_accum + block * Tiles::kDqFloats + warpgroup * Tiles::kDqPart;
            target_ = reinterpret_cast<float4*>(part) + threadIdx.x % 128;
        }
    }

    // A slice of the dQ that belongs to this stage's queries.
    template <class Accumulator>
    __device__ __forceinline__ void store(Accumulator const& dq, int slice, int stage) {
        if constexpr (Config::kStageDq) {
            uint32_t const parity = Tiles::kDqSlices == 1 ? stage : slice;
            PipelineState<1> const state{0, parity};
            shared_.pipeline_dq[warpgroup_].wait_empty(state);
            float4* const target =
                reinterpret_cast<float4*>(shared_.dq + warpgroup_ * SharedStorage<Config>::kPart) +
                threadIdx.x % 128;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                target[i * 128] = make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
            }
            shared_.pipeline_dq[warpgroup_].commit(state);
        } else {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                ptx::reduce_add(target_ + (slice * kVectors + i) * 128, dq(4 * i), dq(4 * i + 1),
                                dq(4 * i + 2), dq(4 * i + 3));
            }
            if (slice == Tiles::kDqSlices - 1) {
                target_ += Tiles::kDqFloats / 4 + to_next_head_;
                to_next_head_ = 0;
            }
        }
    }

    // The next store is the last of a query head, whose blocks are so many: dQ is one iteration late.
    __device__ __forceinline__ void next_head(int blocks) {
        if constexpr (!Config::kStageDq) {
            to_next_head_ = (params_.query_blocks - blocks) * (Tiles::kDqFloats / 4);
        }
    }

  private:
    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warpgroup_;
    float4* target_;  // kReduced: where this thread's part of the next dQ goes
    int64_t to_next_head_ = 0;
};

}  // namespace flash8
