// Everything that a variant of the forward kernel fixes at compile time, in one struct. The -D options come
// from flash8.backends.hopper.variants, with enumerators by name. The rest is derived from them here.

#pragma once

#include "../arch/pipeline.cuh"
#include "../arch/registers.cuh"
#include "../arch/smem_tile.cuh"
#include "../arch/wgmma_shapes.cuh"
#include "../attention/descales.cuh"
#include "../attention/exp2.cuh"
#include "../attention/mask.cuh"
#include "../attention/score_mod.cuh"
#include "../attention/tile_scheduler.cuh"
#include "../kernel_info.h"
#include "gathered_keys.cuh"
#include "params.h"
#include "tile_size.cuh"

#include <cutlass/numeric_types.h>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

// Every so many-th exponential of unmasked tiles is a polynomial on the FMA units; 0 is none. To be tuned on
// a GPU.
#ifndef FLASH8_POLYNOMIAL_EVERY
#define FLASH8_POLYNOMIAL_EVERY 0
#endif

namespace flash8 {

// The types of q, k and v.
enum class ElementChoice { kFp16, kBf16, kE4m3 };
// The type of k and v: q's, or e4m3 under a q of 16 bits, which the producer widens to q's.
enum class CacheChoice { kSame, kE4m3 };
// The type of O: 16 bits, or e4m3 with scales (OutScaleRef).
enum class OutChoice { kWide, kE4m3 };

struct ForwardConfig {
    static constexpr auto kElement = ElementChoice::FLASH8_DTYPE;
    static constexpr bool kFp8 = kElement == ElementChoice::kE4m3;
    using Element = std::conditional_t<
        kFp8, cutlass::float_e4m3_t,
        std::conditional_t<kElement == ElementChoice::kFp16, cutlass::half_t, cutlass::bfloat16_t>>;
    static constexpr bool kWidens = CacheChoice::FLASH8_CACHE == CacheChoice::kE4m3;
    static constexpr bool kHasDescales = kFp8 || kWidens;
    static constexpr bool kOutE4m3 = OutChoice::FLASH8_OUT == OutChoice::kE4m3;
    using Stored = std::conditional_t<kOutE4m3, uint8_t, uint16_t>;  // an element of O
    static constexpr int kHeadDim = FLASH8_HEAD_DIM;
    static constexpr int kHeadDimV = FLASH8_HEAD_DIM_V;
    static constexpr auto kMask = MaskMode::FLASH8_MASK;
    static constexpr bool kSoftcap = FLASH8_SOFTCAP;
    static constexpr bool kAlibi = FLASH8_ALIBI;
    static constexpr bool kPackGqa = FLASH8_PACK_GQA;
    static constexpr bool kDropout = FLASH8_DROPOUT;
    // CTAs that load each K and V tile together: each loads a share of its rows and multicasts it to all.
    static constexpr int kClusterM = FLASH8_CLUSTER ? 2 : 1;
    static constexpr auto kScales = ScaleGranularity::FLASH8_SCALES;
    static constexpr bool kBlockScales = kScales == ScaleGranularity::kBlock;
    using Exponentials =
        flash8::Exponentials<FLASH8_POLYNOMIAL_EVERY, kFp8                               ? 2
                                                      : kElement == ElementChoice::kBf16 ? 3
                                                                                         : 4>;
    // FP8: V in global memory is column-major (keys contiguous), as the quantizer writes it.
    static constexpr bool kVColMajor = FLASH8_V_COLMAJOR;
    static constexpr bool kTransposeV = kFp8 && !kVColMajor;
    // K and V lie in pages, which TMA loads, or which are gathered. For TMA left padding that ends inside of
    // a tile needs a mask at the left edge. What is widened is gathered from wherever it lies.
    static constexpr auto kPages = kWidens                     ? PageChoice::kWidenedKeys
                                   : !FLASH8_PAGED             ? PageChoice::kNone
                                   : FLASH8_GATHER             ? PageChoice::kGatheredPages
                                   : kMask == MaskMode::kLocal ? PageChoice::kPaddedPages
                                                               : PageChoice::kPages;
    static constexpr bool kPaged = kPages != PageChoice::kNone;
    static constexpr bool kGather = kPages == PageChoice::kGatheredPages;
    // Keys that no query of the tile sees arrive as zeros.
    static constexpr bool kHiddenKeysAreZero = kGather || kWidens;
    static_assert(FLASH8_PAGED || !FLASH8_GATHER, "what is gathered are pages");
    static_assert(!kWidens || (!kFp8 && !FLASH8_PAGED), "widened are keys of e4m3, wherever they lie");
    static_assert(!kPaged || (kClusterM == 1 && !kVColMajor && !kBlockScales && !kDropout),
                  "pages are loaded by one CTA, by token, and number no keys of a whole sequence");
    static_assert(kFp8 == (kScales != ScaleGranularity::kNone), "e4m3 has descales, 16-bit types have none");
    static_assert(kFp8 || !kVColMajor, "16-bit products take V as it is");
    static_assert(!kOutE4m3 || (kHeadDimV % kOutScaleChannels == 0 && !kDropout),
                  "a row of a head is whole groups of channels that share a scale, of inference");
    static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0,
                  "tiles are made of panels of at least 32 columns");

    static constexpr int kWidestHead = kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV;
    static constexpr int kBlockM = block_m(kWidestHead);
    // Whether the softmax of an FP8 warpgroup overlaps its own product P V (mainloop_fp8_overlapped.cuh) or
    // only products of another (mainloop_fp8.cuh). The first needs registers for a whole T beside S and O:
    //
    //   head_dim 64           no: three warpgroups of 160 registers keep the exponentials busier, and those
    //                         take longest there
    //   head_dim above 192    no: three stages of K and V do not fit shared memory
    //   head_dim_v above 128  no: O and T do not fit the registers
    //   windows, softcap, ALiBi, dropout  no: they want registers of each row, too
    //   descales per block, without a mask or with column-major V  no: one register is spilled
    //   everything else       yes
    static constexpr bool kOverlapPV = kFp8 && kHeadDim > 64 && kHeadDim <= 192 && kHeadDimV <= 128 &&
                                       kMask != MaskMode::kLocal && !kSoftcap && !kAlibi && !kDropout &&
                                       !(kBlockScales && (kMask == MaskMode::kNone || kVColMajor));
    static constexpr int kBlockN = kWidens    ? block_n_widened(kHeadDim, kHeadDimV)
                                   : kFp8     ? block_n_fp8(kHeadDim, kHeadDimV, kScales, kOverlapPV)
                                   : kDropout ? block_n_dropout(kHeadDim, kHeadDimV)
                                   : kPaged   ? block_n_paged(kHeadDim, kHeadDimV, kMask)
                                              : block_n(kHeadDim, kHeadDimV, kMask);
    static constexpr int kStages = kOverlapPV ? 3 : 2;
    static_assert(kClusterM == 1 || kMask == MaskMode::kNone, "the CTAs of a cluster need the same keys");
    static_assert(kBlockN / kClusterM % 8 == 0, "a share is made of whole swizzle atoms");

    using TileMask = Mask<kMask, kBlockM, kBlockN, kPackGqa, kPages == PageChoice::kPaddedPages>;

    static constexpr int kRowsPerWarpgroup = 64;
    static constexpr int kConsumerWarpgroups = kBlockM / kRowsPerWarpgroup;
    static constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
    static constexpr int kThreads = (kConsumerWarpgroups + 1) * 128;
    // Warps of the producer warpgroup: the first one issues TMA, then come those that gather pages, and
    // those that transpose V.
    static constexpr int kGatherWarps = !kGather ? 0 : kTransposeV ? 1 : 2;
    static constexpr int kTransposerWarps = kTransposeV ? 3 - kGatherWarps : 0;
    // Or all warps of it widen K and V, an equal share of the keys each.
    static constexpr int kWidenerWarps = kWidens ? 4 : 0;
    // Transposing takes more registers than loading, and widening more than that.
    using Registers = RegisterBudget<kConsumerWarpgroups, kWidens ? 56 : kTransposeV ? 40 : 32>;
    static_assert(Registers::kThreads == kThreads);
    // Turns help while a block's products do not take much longer than its softmax. FP8 needs them where it
    // overlaps nothing within a warpgroup.
    static constexpr bool kTakeTurns = kFp8 || kWidestHead <= 128;

    static constexpr int kPanel = panel_bytes(kHeadDim * sizeof(Element)) / sizeof(Element);
    static constexpr int kPanelV = panel_bytes(kHeadDimV * sizeof(Element)) / sizeof(Element);
    using TileQ = SmemTile<Element, kPanel, kBlockM, kHeadDim>;
    using TileK = SmemTile<Element, kPanel, kBlockN, kHeadDim, kStages>;
    // 16 bit: V as TMA writes it, a row for each key. FP8: V transposed, a row for each channel. Keys and
    // channels are permuted as in transpose_v.cuh, also when V comes column-major from global memory. TMA
    // then loads the keys in panels: 224 keys as two panels of 128, not as seven of 32. The last panel ends
    // in keys that are never read.
    using TileV = SmemTile<Element, kPanelV, kBlockN, kHeadDimV, kStages>;
    static constexpr int kKeysVt = kVColMajor && kBlockN == 224 ? 256 : kBlockN;
    static constexpr int kPanelVt = panel_bytes(kKeysVt * sizeof(Element)) / sizeof(Element);
    using TileVt = SmemTile<Element, kPanelVt, kHeadDimV, kKeysVt, kStages>;
    // Columns of O that one product computes. FP8 promotes T = P V into O. Wide heads do that in quarters,
    // since O and a whole T do not fit the registers.
    static constexpr int kColumnsPV = kFp8 && kHeadDimV > 192 ? 64 : kHeadDimV;
    static constexpr auto kMajorV = kFp8 ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
    using MmaQK = cute::MMA_Traits<decltype(k_major_mma<Element, kBlockN, kHeadDim>())>;
    using MmaPV = cute::MMA_Traits<
        decltype(cute::GMMA::rs_op_selector<Element, Element, float,
                                            cute::Shape<cute::_64, cute::Int<kColumnsPV>, cute::Int<kBlockN>>,
                                            cute::GMMA::Major::K, kMajorV>())>;

    static constexpr int kBytesQ = kBlockM * kHeadDim * sizeof(Element);
    static constexpr int kElementsV = kKeysVt * kHeadDimV;  // of a stage
    static constexpr int kBytesV = kElementsV * sizeof(Element);
};

// V between TMA and the warps that transpose it.
template <class Config, bool kUsed>
struct TransposeStorage {};
template <class Config>
struct TransposeStorage<Config, true> {
    alignas(1024) typename Config::Element v_rows[Config::kStages * Config::kElementsV];
    Pipeline<Config::kStages> pipeline_v_rows;
};

template <int kWarps>
struct GatherStorage {
    GatheredKeys gathered_keys[kWarps];
};
template <>
struct GatherStorage<0> {};

// A tile of K and one of V as they are read, before they are widened.
template <class Config, bool kUsed>
struct WidenStorage {};
template <class Config>
struct WidenStorage<Config, true> {
    alignas(16) uint8_t narrow_k[Config::kBlockN * Config::kHeadDim];
    alignas(16) uint8_t narrow_v[Config::kBlockN * Config::kHeadDimV];
};

// What a mainloop that overlaps P V has no registers for.
struct KeptTile {
    WorkTile tile;
    SeqlenInfo info;
    float v_scale;
    uint32_t parity_q;  // of the consumers' position in the pipelines
    uint32_t parity_tiles;
};
struct BlockDescales {
    float k;
    float v_ratio;  // V's descale of the block before, in the order of the walk, by this one's
};
template <class Config, bool kUsed>
struct OverlapStorage {};
template <class Config>
struct OverlapStorage<Config, true> {
    KeptRows kept_rows[Config::kConsumerWarps * 32];  // of each thread, for masked blocks
    KeptTile kept_tiles[Config::kConsumerWarps];      // for the epilogue
    BlockDescales descales[Config::kStages];          // of the blocks in K's stages
};

template <class Config>
struct SharedStorage : TransposeStorage<Config, Config::kTransposeV>,
                       WidenStorage<Config, Config::kWidens>,
                       GatherStorage<Config::kGatherWarps + Config::kWidenerWarps>,
                       OverlapStorage<Config, Config::kOverlapPV> {
    using Element = typename Config::Element;

    alignas(1024) Element q[Config::kBlockM * Config::kHeadDim];
    alignas(1024) Element k[Config::kStages * Config::kBlockN * Config::kHeadDim];
    alignas(1024) Element v[Config::kStages * Config::kElementsV];
    // FP8 with K - mean(K): what must be added to the scores of a row, kept during its mainloop.
    float score_shift[Config::kFp8 ? Config::kBlockM : 1];
    TileQueue tiles;
    Pipeline<1> pipeline_q;
    Pipeline<Config::kStages> pipeline_k;
    Pipeline<Config::kStages> pipeline_v;
    PackedWalk packed_walk;  // of the warp that finds tiles

    // V as it lies in memory: for the consumers, or for the warps that transpose it for them.
    __device__ __forceinline__ Pipeline<Config::kStages>& pipeline_of_v() {
        if constexpr (Config::kTransposeV) {
            return this->pipeline_v_rows;
        } else {
            return pipeline_v;
        }
    }
    __device__ __forceinline__ Element* stages_of_v() {
        if constexpr (Config::kTransposeV) {
            return this->v_rows;
        } else {
            return v;
        }
    }

    // Every arrival count. Q, K and V are filled by one thread's TMA, unless K and V are gathered by the
    // lanes of a warp, or V goes through the warps that transpose it, or both are widened by all warps of the
    // producer warpgroup. The first of them, which finds the next tile, takes none from the queue.
    __device__ void init_pipelines() {
        static_assert(!Config::kGather || Config::kGatherWarps == 1 || Config::kGatherWarps == 2);
        static_assert(1 + Config::kGatherWarps + Config::kTransposerWarps <= 4, "a warpgroup produces");
        static_assert(Config::kWidenerWarps == 0 || Config::kWidenerWarps == 4, "all warps or none");
        constexpr int kGatherLanes = 32;  // one warp fills K, and one V
        constexpr int kLoadersOfK = Config::kWidens   ? Config::kWidenerWarps
                                    : Config::kGather ? kGatherLanes
                                                      : 1;
        constexpr int kLoadersOfV = Config::kWidens   ? Config::kWidenerWarps
                                    : Config::kGather ? kGatherLanes + 1  // and who claims tiles
                                                      : 1;
        constexpr int kFollowers =
            Config::kWidens ? Config::kWidenerWarps - 1 : Config::kGatherWarps + Config::kTransposerWarps;
        tiles.init(Config::kConsumerWarps + kFollowers);
        pipeline_q.init(Config::kConsumerWarps);
        pipeline_k.init(Config::kConsumerWarps * Config::kClusterM, kLoadersOfK);
        if constexpr (Config::kTransposeV) {
            this->pipeline_v_rows.init(Config::kTransposerWarps * Config::kClusterM, kLoadersOfV);
            pipeline_v.init(Config::kConsumerWarps, Config::kTransposerWarps);
        } else {
            pipeline_v.init(Config::kConsumerWarps * Config::kClusterM, kLoadersOfV);
        }
    }
};

constexpr int kSharedBytes = sizeof(SharedStorage<ForwardConfig>);
static_assert(kSharedBytes <= 227 * 1024, "the tiles do not fit shared memory");

}  // namespace flash8
