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

    // Of a tile whose first column is n0.
    __device__ __forceinline__ void run(int blocks, int n0, Accumulator (&sum)[kWaves]) {
        if constexpr (Config::kFastAccum) {
            run_fast(blocks, sum);
        } else {
            run_promoted(blocks, columns_of_first_scale(n0), sum);
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

    // Of the tile's columns, those with the first of its scales of B.
    __device__ __forceinline__ static int columns_of_first_scale(int n0) {
        return kScaleBlock - n0 % kScaleBlock;
    }

    // The scales of this thread's sums in a stage: by wave, row, and columns that share one.
    struct Scales {
        static constexpr int kParts = Config::kBlockScales ? Config::kBlockN / Config::kSharingColumns : 1;
        float values[kWaves][2][kParts];
    };

    __device__ __forceinline__ Scales scales_of(int stage, int first_columns) const {
        Scales scales;
        if constexpr (Config::kBlockScales) {
            BlockScales const& given = shared_.scales[stage];
            float of_columns[Config::kColumnScales];
#pragma unroll
            for (int i = 0; i < Config::kColumnScales; ++i) {
                of_columns[i] = given.b[i];
            }
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float const of_row = given.a[first_row_ + wave * Config::kWaveRows + 8 * r];
                    float const first = __fmul_rn(of_row, of_columns[0]);
                    float const last = __fmul_rn(of_row, of_columns[Config::kColumnScales - 1]);
#pragma unroll
                    for (int part = 0; part < Scales::kParts; ++part) {
                        int const column = part * Config::kSharingColumns;
                        bool const is_first = part == 0 || (column < kScaleBlock && column < first_columns);
                        scales.values[wave][r][part] = is_first ? first : last;
                    }
                }
            }
        }
        return scales;
    }

    __device__ __forceinline__ static void promote(Accumulator& t, float const (&scale)[2][Scales::kParts],
                                                   Accumulator& sum) {
        constexpr int kValues = Config::kBlockN / 4;  // of a row
        auto const from = rows_of(t);
        auto to = rows_of(sum);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                float const x = from(r, i);
                to(r, i) = Config::kBlockScales
                               ? __fmaf_rn(scale[r][i * Scales::kParts / kValues], x, to(r, i))
                               : __fadd_rn(to(r, i), x);
            }
        }
    }

    __device__ __forceinline__ void run_promoted(int blocks, int first_columns, Accumulator (&sum)[kWaves]) {
        Accumulator t;
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
            cute::clear(sum[wave]);
        }
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            shared_.pipeline.wait(state_);
            Scales const scales = scales_of(state_.stage, first_columns);
#pragma unroll
            for (int wave = 0; wave < kWaves; ++wave) {
                cute::warpgroup_fence_operand(t);
                issue<true>(state_.stage, wave, t);
                cute::warpgroup_wait<0>();
                cute::warpgroup_fence_operand(t);
                if (wave == kWaves - 1) {
                    release_and_advance<Config::kClusterM>(shared_.pipeline, state_);
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
            release_and_advance<Config::kClusterM>(shared_.pipeline, before);
            state_.advance();
        }
        cute::warpgroup_wait<0>();
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
            cute::warpgroup_fence_operand(sum[wave]);
        }
        release<Config::kClusterM>(shared_.pipeline, before);
    }

    SharedStorage& shared_;
    State state_;
    int first_row_;
    uint32_t a_;  // descriptors of stage 0
    uint32_t b_;
    Config::Mma mma_;
};

}  // namespace flash8::gemm
