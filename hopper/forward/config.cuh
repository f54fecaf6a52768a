// Everything a variant of the forward kernel fixes at compile time, in one struct. The -D options come from
// flash8.variants; what they do not say follows from them here.

#pragma once

#include "../mask.cuh"
#include "../params.h"
#include "../pipeline.cuh"
#include "../tile_scheduler.cuh"
#include "../wgmma_shapes.cuh"

#include <cutlass/numeric_types.h>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace flash8 {

// The words of flash8.variants, by their position there.
enum class ElementChoice : int { kFp16 = 0, kBf16 = 1, kE4m3 = 2 };

// kBlockM x kBlockN: the largest tiles whose accumulators fit the registers without spilling and whose stages
// fit shared memory.
constexpr int block_m(int head_dim) {
    return head_dim <= 64 ? 192 : 128;
}
constexpr int block_n(int head_dim, int head_dim_v, MaskMode mask) {
    if (head_dim == 128 && head_dim_v == 128 && mask == MaskMode::kNone) {
        return 176;
    }
    if (head_dim_v <= 128 && head_dim <= 192) {
        return 128;
    }
    if (head_dim <= 192 && head_dim_v <= 192) {
        return 96;
    }
    return mask == MaskMode::kLocal ? 64 : 80;
}

// TMA writes a tile in panels of one swizzle row: 64 elements (128 bytes), or 32 where 64 does not divide.
constexpr int panel(int head_dim) {
    return head_dim % 64 == 0 ? 64 : 32;
}

struct ForwardConfig {
    static constexpr auto kElement = static_cast<ElementChoice>(FLASH8_DTYPE);
    using Element =
        std::conditional_t<kElement == ElementChoice::kFp16, cutlass::half_t, cutlass::bfloat16_t>;
    static constexpr int kHeadDim = FLASH8_HEAD_DIM;
    static constexpr int kHeadDimV = FLASH8_HEAD_DIM_V;
    static constexpr auto kMask = static_cast<MaskMode>(FLASH8_MASK);
    static constexpr bool kSoftcap = FLASH8_SOFTCAP;
    static constexpr bool kAlibi = FLASH8_ALIBI;
    static constexpr bool kPackGqa = FLASH8_PACK_GQA;
    static_assert(kElement != ElementChoice::kE4m3, "this kernel takes 16-bit elements");
    static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "tiles are made of panels of 32 or 64 columns");
    static_assert(!FLASH8_KV && !FLASH8_SPLIT && !FLASH8_SCALES,
                  "paged KV, KV splits and descales have no kernel yet");

    static constexpr int kWidestHead = kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV;
    static constexpr int kBlockM = block_m(kWidestHead);
    static constexpr int kBlockN = block_n(kHeadDim, kHeadDimV, kMask);
    static constexpr int kStages = 2;

    using TileMask = Mask<kMask, kBlockM, kBlockN, kPackGqa>;

    static constexpr int kRowsPerWarpgroup = 64;
    static constexpr int kConsumerWarpgroups = kBlockM / kRowsPerWarpgroup;
    static constexpr int kThreads = (kConsumerWarpgroups + 1) * 128;
    // Times 128 threads each: together at most the 64K registers of a multiprocessor.
    static constexpr int kProducerRegisters = kConsumerWarpgroups == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumerWarpgroups == 2 ? 232 : 160;
    // Taking turns pays while a block's products are not much longer than its softmax.
    static constexpr bool kTakeTurns = kWidestHead <= 128;

    static constexpr int kPanel = panel(kHeadDim);
    static constexpr int kPanelV = panel(kHeadDimV);

    template <int kColumns>
    using KMajorAtom = std::conditional_t<kColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                          cute::GMMA::Layout_K_SW64_Atom<Element>>;
    template <int kColumns>
    using MnMajorAtom = std::conditional_t<kColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                           cute::GMMA::Layout_MN_SW64_Atom<Element>>;

    using SmemLayoutQ = decltype(cute::tile_to_shape(KMajorAtom<kPanel>{},
                                                     cute::Shape<cute::Int<kBlockM>, cute::Int<kHeadDim>>{}));
    using SmemLayoutK = decltype(cute::tile_to_shape(
        KMajorAtom<kPanel>{}, cute::Shape<cute::Int<kBlockN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
    // V as the product wants it: (head_dim_v, key, stage), head_dim_v contiguous.
    using SmemLayoutVt = decltype(cute::tile_to_shape(
        MnMajorAtom<kPanelV>{}, cute::Shape<cute::Int<kHeadDimV>, cute::Int<kBlockN>, cute::Int<kStages>>{},
        cute::Step<cute::_2, cute::_1, cute::_3>{}));

    using MmaQK = decltype(scores_mma<Element, kBlockN, kHeadDim>());
    using MmaPV = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<Element, Element, float,
                                   cute::Shape<cute::_64, cute::Int<kHeadDimV>, cute::Int<kBlockN>>,
                                   cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

    static constexpr int kBytesQ = kBlockM * kHeadDim * sizeof(Element);
    static constexpr int kBytesK = kBlockN * kHeadDim * sizeof(Element);
    static constexpr int kBytesV = kBlockN * kHeadDimV * sizeof(Element);
};

struct SharedStorage {
    using Config = ForwardConfig;

    alignas(1024) Config::Element q[Config::kBlockM * Config::kHeadDim];
    alignas(1024) Config::Element k[Config::kStages * Config::kBlockN * Config::kHeadDim];
    alignas(1024) Config::Element v[Config::kStages * Config::kBlockN * Config::kHeadDimV];
    TileQueue tiles;
    Pipeline<1> pipeline_q;
    Pipeline<Config::kStages> pipeline_k;
    Pipeline<Config::kStages> pipeline_v;
};

constexpr int kSharedBytes = sizeof(SharedStorage);
static_assert(kSharedBytes <= 227 * 1024, "the tiles do not fit shared memory");

}  // namespace flash8
