// Everything a variant of the backward kernel fixes at compile time, in one struct: what the -D options do
// not say follows from them here.

#pragma once

#include "../arch/pipeline.cuh"
#include "../arch/registers.cuh"
#include "../arch/smem_tile.cuh"
#include "../arch/wgmma_m64n48.cuh"
#include "../attention/dropout.cuh"
#include "key_tile.cuh"
#include "variant.cuh"

#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

namespace flash8 {

// How dQ reaches the workspace: staged in shared memory for a bulk reduction, or added from registers.
enum class DqChoice { kStaged, kReduced };

// The product of P^T or dS^T, in registers or [query][key] in shared memory, with a tile by its rows.
template <class Element, bool kInSharedMemory, int kN, int kDepth>
constexpr auto keys_mma() {
    using namespace cute;
    using Shape64 = Shape<_64, Int<kN>, Int<kDepth>>;
    if constexpr (kInSharedMemory) {
        return GMMA::ss_op_selector<Element, Element, float, Shape64, GMMA::Major::MN, GMMA::Major::MN>();
    } else {
        return GMMA::rs_op_selector<Element, Element, float, Shape64, GMMA::Major::K, GMMA::Major::MN>();
    }
}

struct BackwardConfig : BackwardVariant {
    static constexpr auto kMask = MaskMode::FLASH8_MASK;
    static constexpr bool kSoftcap = FLASH8_SOFTCAP;
    static constexpr bool kAlibi = FLASH8_ALIBI;
    static constexpr bool kDropout = FLASH8_DROPOUT;
    static constexpr bool kStageDq = DqChoice::FLASH8_DQ == DqChoice::kStaged;
    // dQ of a block is added up in the order of the keys, so that it always has the same bits.
    static constexpr bool kDeterministic = FLASH8_DETERMINISTIC;
    static_assert(kStageDq || !kDeterministic, "only one thread of a CTA can wait for its turn");
    static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0,
                  "tiles are made of panels of at least 32 columns");

    static constexpr int kBlockM = Tiles::kBlockM;
    static constexpr int kBlockN = Tiles::kBlockN;
    static constexpr int kStages = 2;  // of Q and dS: they move once an iteration, under one state
    static constexpr int kStagesDo = Tiles::kStagesDo;
    static constexpr bool kSplitChannels = Tiles::kSplitChannels;
    using KeyMask = QueryMask<kMask, kBlockM, kBlockN>;

    static constexpr int kConsumerWarpgroups = Tiles::kWarpgroups;
    static constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
    static constexpr int kThreads = (kConsumerWarpgroups + 1) * 128;
    using Registers = RegisterBudget<kConsumerWarpgroups, 24>;
    static_assert(Registers::kThreads == kThreads);
    // What a warpgroup has of S and dP, 64 keys and so many queries, and of dK and dV.
    static constexpr int kQueries = kSplitChannels ? kBlockM / kConsumerWarpgroups : kBlockM;
    static constexpr int kColumnsDk = Tiles::kColumnsDk;
    static constexpr int kColumnsDv = Tiles::kColumnsDv;
    // fp32 P and the whole of dP would not fit the registers beside dK and dV.
    static constexpr int kBlockDp = kQueries == 128 ? 64 : kQueries;         // queries of a product dP
    static constexpr int kDqColumns = Tiles::kDqColumns / Tiles::kDqSlices;  // of a product dQ

    // An operand's panels hold no channel that another product takes.
    static constexpr int kPanelQ = Tiles::kPanelQ;
    static constexpr int kPanelV = panel_bytes(kColumnsDv * sizeof(Element)) / sizeof(Element);
    static constexpr int kPanelDq = panel_bytes(kDqColumns * sizeof(Element)) / sizeof(Element);
    static constexpr int kPanelK = cute::min(kPanelQ, kPanelDq);
    using TileQ = SmemTile<Element, kPanelQ, kBlockM, kHeadDim, kStages>;
    using TileDo = SmemTile<Element, kPanelV, kBlockM, kHeadDimV, kStagesDo>;
    using TileK = SmemTile<Element, kPanelK, kBlockN, kHeadDim>;
    using TileV = SmemTile<Element, kPanelV, kBlockN, kHeadDimV>;
    static constexpr int kPanelDs = 64;  // keys: those of one warpgroup
    using TileDs = SmemTile<Element, kPanelDs, kBlockM, kBlockN, kStages>;
    using TileP = SmemTile<Element, kPanelDs, kBlockM, kBlockN>;

    // FP8: Q, K and V as they are stored.
    static constexpr int kPanelQ8 = panel_bytes(kHeadDim);
    static constexpr int kPanelV8 = panel_bytes(kHeadDimV);
    using TileQ8 = SmemTile<cutlass::float_e4m3_t, kPanelQ8, kBlockM, kHeadDim, kStages>;
    using TileK8 = SmemTile<cutlass::float_e4m3_t, kPanelQ8, kBlockN, kHeadDim>;
    using TileV8 = SmemTile<cutlass::float_e4m3_t, kPanelV8, kBlockN, kHeadDimV>;
    // What S is made from.
    using TileScoreQ = std::conditional_t<kFp8, TileQ8, TileQ>;
    using TileScoreK = std::conditional_t<kFp8, TileK8, TileK>;

    template <int kN, int kDepth>
    using Shape = cute::Shape<cute::_64, cute::Int<kN>, cute::Int<kDepth>>;
    // S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T can be operands in registers. Split by channels,
    // they are operands in shared memory, where both warpgroups have written them.
    using MmaS = cute::MMA_Traits<
        decltype(cute::GMMA::ss_op_selector<Stored, Stored, float, Shape<kQueries, kHeadDim>>())>;
    using MmaDp = cute::MMA_Traits<
        decltype(cute::GMMA::ss_op_selector<Element, Element, float, Shape<kBlockDp, kHeadDimV>>())>;
    using MmaDv = cute::MMA_Traits<decltype(keys_mma<Element, kSplitChannels, kColumnsDv, kBlockM>())>;
    using MmaDk = cute::MMA_Traits<decltype(keys_mma<Element, kSplitChannels, kColumnsDk, kBlockM>())>;
    using MmaDq = cute::MMA_Traits<decltype(columns_mma<Element, kDqColumns, kBlockN>())>;
    // P^T, later dS^T, of 64 keys: eight accumulators are one k-step's fragment, in the same order.
    using LayoutP = cute::Layout<
        cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kQueries / 16>>>;

    static constexpr int kElementsQ = kBlockM * kHeadDim;
    static constexpr int kElementsDo = kBlockM * kHeadDimV;
    static constexpr int kElementsDs = kBlockM * kBlockN;
    using Rows = RowStats<kBlockM, kFp8>;
    static_assert(!kFp8 || kBlockN * kHeadDimV <= kStages * kElementsDs * static_cast<int>(sizeof(Element)),
                  "V in FP8 lies where dS will be");
};

// dQ between the warpgroups and the bulk reduction, a part each.
template <class Config, bool kUsed>
struct DqStorage {};
template <class Config>
struct DqStorage<Config, true> {
    static constexpr int kPart = Config::Tiles::kDqPart / Config::Tiles::kDqSlices;
    alignas(1024) float dq[Config::kConsumerWarpgroups * kPart];
};

// FP8: Q and K as they are stored.
template <class Config, bool kUsed>
struct Fp8Storage {};
template <class Config>
struct Fp8Storage<Config, true> {
    alignas(1024) typename Config::Stored q8[Config::kStages * Config::kElementsQ];
    alignas(1024) typename Config::Stored k8[Config::kBlockN * Config::kHeadDim];
};

// What the loads of tiles count on that a warp clears in part before the consumers see them. One for every
// stage: a load into it has been cleared and read before the next one begins.
template <int kStages>
struct RaggedBarriers {
    uint64_t keys;
    uint64_t q[kStages];
    uint64_t dout[kStages];

    __device__ void init() {
        ptx::mbarrier_init(&keys, 1);
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&q[stage], 1);
            ptx::mbarrier_init(&dout[stage], 1);
        }
    }
};

// P between the warpgroups, where each needs that of the other's queries.
template <class Config, bool kUsed>
struct PStorage {};
template <class Config>
struct PStorage<Config, true> {
    alignas(1024) typename Config::Element p[Config::kElementsDs];
};

// The seed of dropout, read once a CTA.
template <bool kUsed>
struct SeedStorage {
    __device__ static void read_seed(DropoutParams const&) {}
};
template <>
struct SeedStorage<true> {
    PhiloxKey seed;

    __device__ void read_seed(DropoutParams const& dropout) { seed = PhiloxKey::read(dropout); }
};

template <class Config>
struct SharedStorage : DqStorage<Config, Config::kStageDq>,
                       PStorage<Config, Config::kSplitChannels>,
                       SeedStorage<Config::kDropout>,
                       Fp8Storage<Config, Config::kFp8> {
    using Element = typename Config::Element;

    alignas(1024) Element k[Config::kBlockN * Config::kHeadDim];
    alignas(1024) Element v[Config::kBlockN * Config::kHeadDimV];
    alignas(1024) Element q[Config::kStages * Config::kElementsQ];
    alignas(1024) Element dout[Config::kStagesDo * Config::kElementsDo];
    alignas(1024) Element ds[Config::kStages * Config::kElementsDs];
    alignas(128) typename Config::Rows stats[Config::kStages];
    KeyTileOf<Config> tile;
    // With a window: the queries that see a key. Each warpgroup has its own.
    QueryRange visible[Config::kMask == MaskMode::kLocal ? 64 * Config::kConsumerWarpgroups : 1];
    Pipeline<1> pipeline_kv;
    Pipeline<Config::kStages> pipeline_q;  // and the rows' statistics
    Pipeline<Config::kStagesDo> pipeline_do;
    Pipeline<Config::kStages> pipeline_ds;
    Pipeline<1> pipeline_p;                                // with split channels
    Pipeline<1> pipeline_dq[Config::kConsumerWarpgroups];  // staged
    RaggedBarriers<Config::kStages> ragged;

    // FP8: V as it is stored. Nobody writes dS before all have read it.
    __device__ typename Config::Stored* v8() { return reinterpret_cast<typename Config::Stored*>(ds); }

    // What S is made from.
    __device__ __forceinline__ auto* score_queries() {
        if constexpr (Config::kFp8) {
            return this->q8;
        } else {
            return q;
        }
    }
    __device__ __forceinline__ auto* score_keys() {
        if constexpr (Config::kFp8) {
            return this->k8;
        } else {
            return k;
        }
    }

    // Every arrival count. Tiles of Q, K, V and dO are filled by one thread's TMA; dS and P by all consumer
    // warps for all of them, whose next wait for it says that the former one has been read; dQ by the warps
    // of a warpgroup for one thread.
    __device__ void init_pipelines() {
        pipeline_kv.init(Config::kConsumerWarps);
        pipeline_q.init(Config::kConsumerWarps);
        pipeline_do.init(Config::kConsumerWarps);
        pipeline_ds.init(Config::kConsumerWarps, Config::kConsumerWarps);
        if constexpr (Config::kSplitChannels) {
            pipeline_p.init(Config::kConsumerWarps, Config::kConsumerWarps);
        }
        ragged.init();
        if constexpr (Config::kStageDq) {
            for (auto& pipeline : pipeline_dq) {
                pipeline.init(1, 4);
            }
        }
    }
};

// What moves once an iteration moves under the state of a ring of two stages: where it stands in one of
// kStages.
template <int kStages>
__device__ __forceinline__ PipelineState<kStages> in_ring_of(PipelineState<2> const& state) {
    if constexpr (kStages == 2) {
        return state;
    } else {
        return {0, static_cast<uint32_t>(state.stage)};
    }
}

// The place before this one.
__device__ __forceinline__ PipelineState<2> former(PipelineState<2> const& state) {
    int const stage = state.stage ^ 1;
    return {stage, state.parity ^ static_cast<uint32_t>(stage)};
}

constexpr int kSharedBytes = sizeof(SharedStorage<BackwardConfig>);
static_assert(kSharedBytes <= 227 * 1024, "the tiles do not fit shared memory");

}  // namespace flash8
