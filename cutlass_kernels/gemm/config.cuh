// Everything that a variant of the GEMM kernel fixes at compile time, in one struct. The -D options come from
// flash8.backends.hopper.gemm_variants, with enumerators by name. The rest is derived from them here.

#pragma once

#include "arch/pipeline.cuh"
#include "arch/registers.cuh"
#include "arch/wgmma.cuh"
#include "arch/wgmma_shapes.cuh"
#include "gemm_params.h"
#include "kernel_info.h"

#include <cutlass/numeric_types.h>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

// A choice that a kernel may leave out.
#ifndef FLASH8_CLUSTER
#define FLASH8_CLUSTER 0
#endif

namespace flash8::gemm {

// What has a scale of its own: a tensor or a row of it (the epilogue applies them), or 128 of a row's k.
enum class Scales { kOuter, kBlock };

struct Config {
    using Element = cutlass::float_e4m3_t;
    static constexpr bool kBlockScales = Scales::FLASH8_SCALES == Scales::kBlock;
    // Products of all of K stay in the tensor core's accumulator, which has 14 bits. Otherwise each kBlockK
    // of them is promoted: added to a sum in fp32.
    static constexpr bool kFastAccum = FLASH8_FAST_ACCUM;
    static_assert(!kBlockScales || !kFastAccum, "scales of blocks are applied when a block is promoted");
    // Rows of A belong to groups, each with a B of its own (grouped_walk.cuh).
    static constexpr bool kGrouped = FLASH8_GROUPED;
    // K belongs to groups, each with an out of its own (k_range.cuh).
    static constexpr bool kGroupedK = FLASH8_GROUPED_K;
    static_assert(!kGrouped || !kGroupedK);
    static constexpr bool kHasGroups = kGrouped || kGroupedK;

    // Two CTAs with neighbouring blocks of rows: each loads half of the tile's B, into both (multicast).
    static constexpr int kClusterM = FLASH8_CLUSTER ? 2 : 1;
    static_assert(kClusterM == 1 || !kHasGroups, "the CTAs of a cluster need the same B");

    static constexpr int kBlockM = FLASH8_BLOCK_M;
    static constexpr int kBlockN = FLASH8_BLOCK_N;
    static constexpr int kBlockK = 128;  // e4m3: a row of the 128-byte swizzle
    // Columns of a tile that share a scale of B wherever the tile begins, and how many scales it may have.
    static constexpr int kSharingColumns = cute::gcd(kBlockN, kScaleBlock);
    static constexpr int kColumnScales = kBlockN == kScaleBlock ? 1 : 2;
    static_assert(!kBlockScales || kBlockN - kSharingColumns <= kScaleBlock,
                  "no tile has a third scale of B");

    static constexpr int kConsumerWarpgroups = 2;
    static constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
    static constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
    static constexpr int kWaveRows = 64;                                        // of one wgmma
    static constexpr int kWaves = kBlockM / (kConsumerWarpgroups * kWaveRows);  // of a warpgroup
    static_assert(kWaves * kWaveRows * kConsumerWarpgroups == kBlockM);
    using Registers = RegisterBudget<kConsumerWarpgroups, 40>;
    static_assert(Registers::kThreads == kThreads);
    // Of the warp that brings A and B: one lane does it, but only a whole warp finds the tiles of groups.
    static constexpr int kWalkingLanes = kHasGroups ? 32 : 1;
    static_assert(kWaves * kBlockN / 2 + (kFastAccum ? 0 : kBlockN / 2) <= 192,
                  "sums and products do not fit the registers");

    // As many stages as fit shared memory.
    static constexpr int kBytesA = kBlockM * kBlockK;
    static constexpr int kBytesB = kBlockN * kBlockK;
    static constexpr int kScaleFloats = kBlockScales ? kBlockM + kColumnScales : 0;
    static constexpr int kStageBytes = kBytesA + kBytesB + 4 * kScaleFloats;
    static constexpr int kStages = (227 * 1024 - 1024) / kStageBytes;

    using Mma = cute::MMA_Traits<decltype(k_major_mma<Element, kBlockN, kBlockK>())>;
    using Accumulator = decltype(cute::make_tensor<float>(LayoutC<kBlockN>{}));
};

// Scales of a stage: of kBlockM rows of A, and of the tile's columns of B.
struct BlockScales {
    float a[Config::kBlockM];
    float b[Config::kColumnScales];
};

struct SharedStorage {
    alignas(1024) Config::Element a[Config::kStages][Config::kBytesA];  // (row, k), swizzled
    alignas(1024) Config::Element b[Config::kStages][Config::kBytesB];
    BlockScales scales[Config::kBlockScales ? Config::kStages : 1];
    Pipeline<Config::kStages> pipeline;
    uint64_t landed[Config::kGroupedK ? Config::kStages : 1];  // TMA of stages that are cut (k_range.cuh)

    // A stage is full when the TMA of one thread has landed and, with blocks, the scales that the 32 lanes of
    // a warp copy. One that is cut is full when the warp that cuts it has done so. It is empty when all
    // consumer warps have released it, those of all CTAs of the cluster, which fill each other's.
    __device__ void init_pipeline() {
        constexpr int kScaleLanes = Config::kBlockScales ? 32 : 0;
        pipeline.init(Config::kClusterM * Config::kConsumerWarps, 1 + kScaleLanes);
        if constexpr (Config::kGroupedK) {
            for (int stage = 0; stage < Config::kStages; ++stage) {
                ptx::mbarrier_init(&landed[stage], 1);
            }
        }
    }
};

constexpr int kSharedBytes = sizeof(SharedStorage);
static_assert(kSharedBytes <= 227 * 1024, "the stages do not fit shared memory");

}  // namespace flash8::gemm
