// Everything that a variant of the GEMM kernel for few rows of A fixes at compile time, in one struct. The -D
// options come from flash8.backends.hopper.gemm_variants, with enumerators by name.

#pragma once

#include "arch/pipeline.cuh"
#include "arch/wgmma.cuh"
#include "gemm_params.h"
#include "kernel_info.h"

#include <cutlass/numeric_types.h>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

namespace flash8::small_m {

// What has a scale of its own: a tensor or a row of it (the epilogue applies them), or 128 of a row's k.
enum class Scales { kOuter, kBlock };

struct Config {
    using Element = cutlass::float_e4m3_t;
    static constexpr bool kBlockScales = Scales::FLASH8_SCALES == Scales::kBlock;

    // B's rows are those of wgmma, 64 of a warpgroup. A's rows are its columns, whose number may be small.
    static constexpr int kBlockM = FLASH8_BLOCK_M;
    static constexpr int kBlockN = FLASH8_BLOCK_N;
    static constexpr int kBlockK = 128;  // e4m3: a row of the 128-byte swizzle
    static constexpr int kWaveRows = 64;
    static_assert(kBlockM % 8 == 0 && kBlockM <= 64, "columns of one wgmma, whose sums fit the registers");
    static_assert(kScaleBlock % kBlockN == 0, "a tile's rows of B share a scale");

    static constexpr int kConsumerWarpgroups = kBlockN / kWaveRows;
    static_assert(kConsumerWarpgroups * kWaveRows == kBlockN);
    static constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
    static constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);

    // As many stages as fit shared memory.
    static constexpr int kBytesA = kBlockM * kBlockK;
    static constexpr int kBytesB = kBlockN * kBlockK;
    static constexpr int kScaleFloats = kBlockScales ? kBlockM + 1 : 0;
    static constexpr int kBarrierBytes = 16;
    static constexpr int kStageBytes = kBytesA + kBytesB + 4 * kScaleFloats + kBarrierBytes;
    static constexpr int kStages = (227 * 1024 - 1024) / kStageBytes;

    using Mma = cute::MMA_Traits<
        decltype(cute::GMMA::ss_op_selector<
                 Element, Element, float, cute::Shape<cute::_64, cute::Int<kBlockM>, cute::Int<kBlockK>>>())>;
    using Accumulator = decltype(cute::make_tensor<float>(LayoutC<kBlockM>{}));  // (B's rows, A's rows)
};

// Scales of a stage: of kBlockM rows of A, and of the tile's rows of B.
struct BlockScales {
    float a[Config::kBlockM];
    float b;
};

struct SharedStorage {
    alignas(1024) Config::Element a[Config::kStages][Config::kBytesA];  // (row, k), swizzled
    alignas(1024) Config::Element b[Config::kStages][Config::kBytesB];
    BlockScales scales[Config::kBlockScales ? Config::kStages : 1];
    Pipeline<Config::kStages> pipeline;

    // A stage is full when the TMA of one thread has landed and, with blocks, the scales that the 32 lanes of
    // a warp copy. It is empty when all consumer warps have released it.
    __device__ void init_pipeline() {
        constexpr int kScaleLanes = Config::kBlockScales ? 32 : 0;
        pipeline.init(Config::kConsumerWarps, 1 + kScaleLanes);
    }
};

constexpr int kSharedBytes = sizeof(SharedStorage);
static_assert(kSharedBytes <= 227 * 1024, "the stages do not fit shared memory");

}  // namespace flash8::small_m
