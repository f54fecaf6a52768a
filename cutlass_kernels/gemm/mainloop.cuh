// A warpgroup's part of a tile: kWaves times 64 rows by kBlockN columns.
//
//   promoted:  per block of k  wait full, read its scales; for each wave  issue T = A B, wait, sum += scale *
//   T fast:      per block of k  wait full, issue sum += A B; wait for the block before, release its stage
//
// Promotion overlaps with the products of the other warpgroup, which nothing keeps in step with this one.

#pragma once

#include "arch/wgmma.cuh"
#include "arch/wgmma_k_major.cuh"
#include "tile_walk.cuh"

#include <cute/algorithm/clear.hpp>

namespace flash8::gemm {

class Mainloop {
    static constexpr int kWaves = Config::kWaves;
    using Accumulator = Config::Accumulator;
    using State = PipelineState<Config::kStages>;

  public:
    __device__ Mainloop(SharedStorage& shared, int warpgroup)
        : shared_(shared),
          first_row_(warpgroup * kWaves * Config::kWaveRows + row_in_wave()),
          a_(k_major_descriptor(shared.a[0]) + warpgroup * kWaves * kWaveStep),
          b_(k_major_descriptor(shared.b[0])) {}

    // The first of the two rows of a wave, 8 apart, that this thread has; of the warpgroup's first wave.
    __device__ __forceinline__ int first_row() const { return first_row_; }

    __device__ __forceinline__ void run(int blocks, Accumulator (&sum)[kWaves]) {
        if constexpr (Config::kFastAccum) {
            run_fast(blocks, sum);
        } else {
            run_promoted(blocks, sum);
        }
    }

  private:
    // In units of descriptors, 16 bytes.
    static constexpr int kWaveStep = Config::kWaveRows * Config::kBlockK / 16;
    static constexpr int kStageA = Config::kBytesA / 16;
    static constexpr int kStageB = Config::kBytesB / 16;

    __device__ __forceinline__ static int row_in_wave() {
        return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    }

    // Issues T (+)= A B for one wave of a stage.
    template <bool kZero>
    __device__ __forceinline__ void issue(int stage, int wave, Accumulator& t) {
        multiply_k_major<kZero, Config::kBlockK>(mma_, a_ + stage * kStageA + wave * kWaveStep,
                                                 b_ + stage * kStageB, t);
    }

    // The scales of this thread's rows in a stage: by wave, and by row.
    struct RowScales {
        float values[kWaves][2];
    };

    __device__ __forceinline__ RowScales scales_of(int stage) const {
        RowScales scales;
        if constexpr (Config::kBlockScales) {
            BlockScales const& given = shared_.scales[stage];
            float const of_columns = given.b;
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    scales.values[wave][r] =
                        __fmul_rn(given.a[first_row_ + wave * Config::kWaveRows + 8 * r], of_columns);
                }
            }
        }
        return scales;
    }

    __device__ __forceinline__ static void promote(Accumulator& t, float const (&scale)[2],
                                                   Accumulator& sum) {
        auto const from = rows_of(t);
        auto to = rows_of(sum);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < Config::kBlockN / 4; ++i) {
                float const x = from(r, i);
                to(r, i) = Config::kBlockScales ? __fmaf_rn(scale[r], x, to(r, i)) : __fadd_rn(to(r, i), x);
            }
        }
    }

    __device__ __forceinline__ void run_promoted(int blocks, Accumulator (&sum)[kWaves]) {
        Accumulator t;
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
            cute::clear(sum[wave]);
        }
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            shared_.pipeline.wait(state_);
            RowScales const scales = scales_of(state_.stage);
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) {
                cute::warpgroup_fence_operand(t);
                issue<true>(state_.stage, wave, t);
                cute::warpgroup_wait<0>();
                cute::warpgroup_fence_operand(t);
                if (wave == kWaves - 1) {
                    release_and_advance(shared_.pipeline, state_);
                }
                promote(t, scales.values[wave], sum[wave]);
            }
        }
    }

    // The first block is peeled: it starts the sums, and nothing but wgmma touches them until the end.
    __device__ __forceinline__ void run_fast(int blocks, Accumulator (&sum)[kWaves]) {
        State before = state_;
        shared_.pipeline.wait(state_);
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
            cute::warpgroup_fence_operand(sum[wave]);
            issue<true>(state_.stage, wave, sum[wave]);
        }
        state_.advance();
#pragma unroll 1
        for (int block = 1; block < blocks; ++block) {
            shared_.pipeline.wait(state_);
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) {
                issue<false>(state_.stage, wave, sum[wave]);
            }
            cute::warpgroup_wait<kWaves>();  // for the block before
            release_and_advance(shared_.pipeline, before);
            state_.advance();
        }
        cute::warpgroup_wait<0>();
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
            cute::warpgroup_fence_operand(sum[wave]);
        }
        shared_.pipeline.release(before);
    }

    SharedStorage& shared_;
    State state_;
    int first_row_;
    uint32_t a_;  // descriptors of stage 0
    uint32_t b_;
    Config::Mma mma_;
};

}  // namespace flash8::gemm
