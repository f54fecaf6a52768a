// Everything that a variant of the GEMM kernel for few rows of A fixes at compile time, in one struct. The -D
// options come from flash8.backends.hopper.gemm_variants, with enumerators by name.

#pragma once

#include "arch/pipeline.cuh"
#include "arch/wgmma.cuh"
#include "gemm_params.h"
#include "kernel_info.h"
#include "quantize/elements.cuh"

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

    // A is e4m3 and has scales; or of 16 bits, and the kernel quantizes it by 1x128.
    static constexpr quantize::Input kInput = quantize::Input::FLASH8_INPUT;
    static constexpr bool kQuantizes = kInput != quantize::Input::kE4m3;
    static_assert(kInput != quantize::Input::kFp32 && (!kQuantizes || kBlockScales));

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
    static constexpr int kQuantizerWarps = 4;
    static constexpr int kThreads = 128 * (1 + kConsumerWarpgroups + (kQuantizes ? 1 : 0));

    // CTAs of a cluster that may share the K of a tile: where it is narrow, since there are few tiles then.
    // Each consumer warp's sums are two parts, of half of A's rows, and each part is added up by one of the
    // CTAs.
    static constexpr int kMaxSplits = kBlockN == kWaveRows ? 8 : 1;
    static constexpr int kParts = 2 * kConsumerWarps;
    static constexpr int kPartFloats = kBlockM / 4;  // of a thread
    static_assert(kMaxSplits == 1 || kParts % kMaxSplits == 0);

    // Of n CTAs each has kParts / n parts, and gets them from n - 1 others: kParts - kParts / n in all.
    static constexpr int kReceivedParts = kMaxSplits > 1 ? kParts - kParts / kMaxSplits : 0;
    static constexpr int kReceivedBytes = kReceivedParts * 32 * kPartFloats * 4 + 8 * kConsumerWarps;

    // As many stages as fit shared memory.
    static constexpr int kBytesA = kBlockM * kBlockK;
    static constexpr int kBytesB = kBlockN * kBlockK;
    static constexpr int kScaleFloats = kBlockScales ? kBlockM + 1 : 0;
    static constexpr int kBytesWideA = kQuantizes ? 2 * kBytesA : 0;
    static constexpr int kBarrierBytes = 24;
    static constexpr int kStageBytes = kBytesA + kBytesB + kBytesWideA + 4 * kScaleFloats + kBarrierBytes;
    static constexpr int kStages = (227 * 1024 - 1024 - kReceivedBytes) / kStageBytes;

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

// A of 16 bits, a stage's rows as they come, and where their arrival is counted. Of e4m3 it has no use.
struct WideRows {
    static constexpr int kStages = Config::kQuantizes ? Config::kStages : 1;
    static constexpr int kElements = Config::kQuantizes ? Config::kBytesA : 8;

    alignas(128) uint16_t a[kStages][kElements];  // (row, k)
    uint64_t full[kStages];
};

// What the other CTAs of a cluster have of the parts that this one adds up (small_m_split_k.cuh). Full counts
// the bytes for a consumer warp.
struct ReceivedSums {
    static constexpr int kParts = Config::kMaxSplits > 1 ? Config::kReceivedParts : 1;

    float4 parts[kParts][Config::kPartFloats / 4][32];  // 32 lanes
    uint64_t full[Config::kConsumerWarps];
};

struct SharedStorage {
    alignas(1024) Config::Element a[Config::kStages][Config::kBytesA];  // (row, k), swizzled
    alignas(1024) Config::Element b[Config::kStages][Config::kBytesB];
    BlockScales scales[Config::kBlockScales ? Config::kStages : 1];
    WideRows wide;
    ReceivedSums received;
    Pipeline<Config::kStages> pipeline;

    // A stage is full when the TMA of one thread has landed and, with blocks, the scales that the 32 lanes of
    // a warp copy, and what the quantizing warps write. It is empty, A of 16 bits too, when all consumer
    // warps have released it.
    __device__ void init_pipeline() {
        constexpr int kScaleLanes = Config::kBlockScales ? 32 : 0;
        constexpr int kQuantizerWarps = Config::kQuantizes ? Config::kQuantizerWarps : 0;
        pipeline.init(Config::kConsumerWarps, 1 + kScaleLanes + kQuantizerWarps);
        if constexpr (Config::kQuantizes) {
            for (uint64_t& barrier : wide.full) {
                ptx::mbarrier_init(&barrier, 1);
            }
        }
    }
};

constexpr int kSharedBytes = sizeof(SharedStorage);
static_assert(kSharedBytes <= 227 * 1024, "the stages do not fit shared memory");

}  // namespace flash8::small_m
