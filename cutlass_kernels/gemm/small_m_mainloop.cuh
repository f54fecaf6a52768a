// A warpgroup's part of a tile: 64 rows of B by kBlockM rows of A.
//
//   per two blocks of k:  wait full, issue T0 = B A^T; wait full, issue T1
//                         wait T0, release its stage, sum += scale * T0; the same of T1
//
// A product takes few cycles and its latency many, so two are in flight. They are promoted one behind the
// other, in the order of k: sums have the bits that the kernel for many rows gives them.

#pragma once

#include "arch/wgmma.cuh"
#include "arch/wgmma_k_major.cuh"
#include "small_m_tile_walk.cuh"

#include <cute/algorithm/clear.hpp>

namespace flash8::small_m {

class Mainloop {
    using Accumulator = Config::Accumulator;
    using State = PipelineState<Config::kStages>;

  public:
    __device__ Mainloop(SharedStorage& shared, int warpgroup)
        : shared_(shared),
          a_(k_major_descriptor(shared.a[0])),
          b_(k_major_descriptor(shared.b[0]) + warpgroup * kWaveStep) {}

    __device__ __forceinline__ void run(int blocks, Accumulator& sum) {
        cute::clear(sum);
        int block = 0;
#pragma unroll 1
        for (; block + 2 <= blocks; block += 2) {
            State done = state_;
            Accumulator t[2];
            issue(t[0]);
            issue(t[1]);
            finish<1>(done, t[0], sum);
            finish<0>(done, t[1], sum);
        }
        if (block < blocks) {
            State done = state_;
            Accumulator t;
            issue(t);
            finish<0>(done, t, sum);
        }
    }

  private:
    // In units of descriptors, 16 bytes.
    static constexpr int kWaveStep = Config::kWaveRows * Config::kBlockK / 16;
    static constexpr int kStageA = Config::kBytesA / 16;
    static constexpr int kStageB = Config::kBytesB / 16;

    // The next stage's products.
    __device__ __forceinline__ void issue(Accumulator& t) {
        shared_.pipeline.wait(state_);
        cute::warpgroup_fence_operand(t);
        multiply_k_major<true, Config::kBlockK>(mma_, b_ + state_.stage * kStageB,
                                                a_ + state_.stage * kStageA, t);
        state_.advance();
    }

    // Waits for the products t of the stage `done` while kLater groups behind them are in flight, and adds
    // them to the sum. The scales are read while the products are made.
    template <int kLater>
    __device__ __forceinline__ void finish(State& done, Accumulator& t, Accumulator& sum) {
        Scaling const scaling = scaling_of(done.stage);
        cute::warpgroup_wait<kLater>();
        cute::warpgroup_fence_operand(t);
        release_and_advance(shared_.pipeline, done);
        promote(t, scaling, sum);
    }

    // Of this thread's columns, rows of A.
    struct Scaling {
        float values[Config::kBlockM / 4];
    };

    __device__ __forceinline__ Scaling scaling_of(int stage) const {
        Scaling found;
        if constexpr (Config::kBlockScales) {
            BlockScales const& given = shared_.scales[stage];
#pragma unroll
            for (int i = 0; i < Config::kBlockM / 4; ++i) {
                int const row = 8 * (i / 2) + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
                found.values[i] = __fmul_rn(given.a[row], given.b);
            }
        }
        return found;
    }

    __device__ __forceinline__ static void promote(Accumulator& t, Scaling const& scaling, Accumulator& sum) {
        auto const from = rows_of(t);
        auto to = rows_of(sum);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < Config::kBlockM / 4; ++i) {
                float const x = from(r, i);
                to(r, i) =
                    Config::kBlockScales ? __fmaf_rn(scaling.values[i], x, to(r, i)) : __fadd_rn(to(r, i), x);
            }
        }
    }

    SharedStorage& shared_;
    State state_;
    uint32_t a_;  // descriptors of stage 0
    uint32_t b_;
    Config::Mma mma_;
};

}  // namespace flash8::small_m
