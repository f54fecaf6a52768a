// A ring of shared-memory stages between one producer thread and the consumer warps.
//
//   producer                         consumer warp
//   acquire: wait empty[stage]       wait:    wait full[stage]
//            expect bytes on full    ... wgmma reads the stage ...
//            TMA ... counts bytes    release: lane 0 arrives at empty[stage]
//
// full completes when the expected bytes have landed; empty completes when every consumer warp has
// released the stage. Both sides walk the same sequence of stages and flip the parity at each wrap.
//
// Stages may also be filled by warps instead of TMA. Each of these warps then waits with wait_empty and ends
// with commit; full completes when all of them have committed.

#pragma once

#include "ptx.cuh"

#include <cstdint>

namespace flash8 {

// The position of one side of a pipeline.
template <int kStages>
struct PipelineState {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        stage += 1;
        if (stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ PipelineState before() const {
        return stage == 0 ? PipelineState{kStages - 1, parity ^ 1} : PipelineState{stage - 1, parity};
    }
};

template <int kStages>
struct Pipeline {
    using State = PipelineState<kStages>;

    uint64_t full[kStages];
    uint64_t empty[kStages];

    __device__ void init(int consumer_warps, int producers = 1) {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&full[stage], producers);
            ptx::mbarrier_init(&empty[stage], consumer_warps);
        }
    }

    // A fresh barrier counts as having completed the phase before its first, so the first round of
    // acquires passes: the producer waits with the opposite parity.
    __device__ __forceinline__ uint64_t* acquire(State const& state, int bytes) {
        wait_empty(state);
        ptx::mbarrier_expect_tx(&full[state.stage], bytes);
        return &full[state.stage];
    }

    __device__ __forceinline__ void wait_empty(State const& state) {
        ptx::mbarrier_wait(&empty[state.stage], state.parity ^ 1);
    }

    // By all lanes of a warp, after their writes to the stage: makes them visible to the tensor core.
    __device__ __forceinline__ void commit(State const& state) {
        ptx::fence_proxy_async();
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive(&full[state.stage]);
        }
    }

    __device__ __forceinline__ void wait(State const& state) {
        ptx::mbarrier_wait(&full[state.stage], state.parity);
    }

    // By all lanes of a warp, after their reads of the stage.
    __device__ __forceinline__ void release(State const& state) {
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive(&empty[state.stage]);
        }
    }

    // The same, to the pipelines of all CTAs of the cluster: their producers fill each other's stages.
    template <int kCtas>
    __device__ __forceinline__ void release_to_cluster(State const& state) {
        int const lane = threadIdx.x % 32;
        if (lane < kCtas) {
            // The barriers of the stages are 8 bytes apart, in every CTA.
            ptx::mbarrier_arrive_cluster(ptx::cluster_address(&empty[0], lane) + 8 * state.stage);
        }
    }

    // The producer's last call: waits until everything it sent has been consumed.
    __device__ void drain(State state) {
        for (int stage = 0; stage < kStages; ++stage) {
            wait_empty(state);
            state.advance();
        }
    }
};

// Releases a stage to the kCtas CTAs that fill it.
template <int kCtas, int kStages>
__device__ __forceinline__ void release(Pipeline<kStages>& pipeline, PipelineState<kStages> const& state) {
    if constexpr (kCtas > 1) {
        pipeline.template release_to_cluster<kCtas>(state);
    } else {
        pipeline.release(state);
    }
}

// The same, and advances to the next stage.
template <int kCtas = 1, int kStages>
__device__ __forceinline__ void release_and_advance(Pipeline<kStages>& pipeline,
                                                    PipelineState<kStages>& state) {
    release<kCtas>(pipeline, state);
    state.advance();
}

}  // namespace flash8
