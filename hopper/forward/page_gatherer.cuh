// Gathers tiles of keys from a paged cache whose pages TMA cannot load: of one key, or of any other number
// that is no multiple of 8, after which the swizzle repeats.
//
// By warps of the producer warpgroup that do nothing else: one for K and one for V, or one for both beside
// the warps that transpose V. 32 keys at a time: each lane looks up where one of them is, the first ones
// before the stage is empty, the others while those before them are copied. Then the lanes of a row get its
// place by a shuffle, and 16 bytes each go from there by cp.async. A key that no query of the tile sees, or
// whose page does not exist, is filled with zeros and not touched. So V holds no hidden keys that need to be
// cleared, and left padding may end anywhere.
//
// The copies are of the generic proxy. A stage is full when those of all lanes have landed; whoever hands it
// to the tensor core fences after waiting for that (wait_for_keys).

#pragma once

#include "../arch/copy_async.cuh"
#include "../arch/swizzled_tile.cuh"
#include "../attention/tile_scheduler.cuh"
#include "config.cuh"

namespace flash8 {

// A warp that gathers K, V, or both. Everything is made anew where it is used, since the producer's warps
// have few registers.
template <class Config, bool kTakesK, bool kTakesV>
class PageGatherer {
    using Element = typename Config::Element;
    using KvState = PipelineState<Config::kStages>;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kKeys = 32;  // of which each lane looks up one

  public:
    // keys: this warp's.
    __device__ PageGatherer(ForwardParams const& params, SharedStorage<Config>& shared, GatheredKeys& keys)
        : params_(params), shared_(shared), keys_(keys) {}

    __device__ void run() {
        PipelineState<1> tiles;
        KvState state;
        for (WorkTile tile = shared_.tiles.take(tiles); tile.valid(); tile = shared_.tiles.take(tiles)) {
#pragma unroll 1
            for (int n_block = enter(tile) - 1; n_block >= keys_.first_block; --n_block) {
                if constexpr (kTakesK) {
                    load<Config::kPanel, Config::kHeadDim>(shared_.pipeline_k, state, shared_.k, params_.k,
                                                           params_.head_dim, n_block);
                }
                if constexpr (kTakesV) {
                    load_v(state, n_block);
                }
                state.advance();
            }
        }
        // No warp ends before its copies have landed.
        if constexpr (kTakesK) {
            shared_.pipeline_k.drain(state);
        }
        if constexpr (kTakesV) {
            shared_.pipeline_of_v().drain(state);
        }
    }

  private:
    // The end of a tile's blocks.
    __device__ int enter(WorkTile const& tile) {
        auto const info = SeqlenInfo::read(params_.sequences, tile.batch, tile.offset_q);
        return keys_.template enter<Config>(params_, info, tile);
    }

    __device__ __forceinline__ void load_v(KvState const& state, int n_block) const {
        load<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_of_v(), state, shared_.stages_of_v(),
                                                 params_.v, params_.head_dim_v, n_block);
    }

    // Fills a stage with a block of keys or values, of which `ref` has `channels`. kLanesPerRow lanes copy a
    // row; the lane that has looked it up is one of them.
    template <int kPanel, int kColumns>
    __device__ __forceinline__ void load(Pipeline<Config::kStages>& pipeline, KvState const& state,
                                         Element* stages, TensorRef const& ref, int channels,
                                         int n_block) const {
        constexpr int kPanelBytes = kPanel * sizeof(Element);
        constexpr int kLanesPerRow = kPanelBytes / 16;
        constexpr int kRows = 32 / kLanesPerRow;              // at a time
        constexpr int kSwizzles = kRows < 8 ? 8 / kRows : 1;  // steps after which it repeats
        constexpr int kPanels = kColumns / kPanel;
        constexpr int kUnrolled = kTakesK && kTakesV ? 4 : kLanesPerRow;  // for want of registers
        using Tile = SwizzledTile<kBlockN, kPanelBytes>;
        int const lane = GatheredKeys::lane_index();
        int const key = lane % kLanesPerRow * kRows + lane / kLanesPerRow;
        int const first_byte = lane % kLanesPerRow * 16;
        uint32_t target[kSwizzles];
#pragma unroll
        for (int i = 0; i < kSwizzles; ++i) {
            target[i] = ptx::shared_address(stages) +
                        state.stage * kBlockN * kColumns * static_cast<int>(sizeof(Element)) +
                        Tile::offset(i * kRows + lane / kLanesPerRow, first_byte);
        }
        KeyPlace place = look_up(n_block * kBlockN + key);
        pipeline.wait_empty(state);
#pragma unroll 1
        for (int chunk = 0; chunk < kBlockN; chunk += kKeys) {
            int64_t const address = keys_.template address_of<sizeof(Element)>(params_.pages, ref, place);
            place = look_up(n_block * kBlockN + chunk + kKeys + key);  // while this chunk is copied
#pragma unroll kUnrolled
            for (int step = 0; step < kLanesPerRow; ++step) {
                if (kBlockN % kKeys != 0 && chunk + step * kRows >= kBlockN) {
                    break;
                }
                int64_t const row = __shfl_sync(0xffffffff, address, step, kLanesPerRow);
                uint32_t const row_target =
                    target[step % kSwizzles] + (step / kSwizzles * kSwizzles * kRows + chunk) * kPanelBytes;
#pragma unroll
                for (int panel = 0; panel < kPanels; ++panel) {
                    constexpr int kSize = sizeof(Element);
                    bool const reads = row >= 0 && panel * kPanelBytes + first_byte < channels * kSize;
                    ptx::copy_async_16(row_target + panel * kBlockN * kPanelBytes,
                                       reinterpret_cast<void const*>(row + first_byte + panel * kPanelBytes),
                                       reads);
                }
            }
        }
        ptx::copy_async_arrive(&pipeline.full[state.stage]);
    }

    __device__ __forceinline__ KeyPlace look_up(int key) const {
        return keys_.template look_up<true>(params_.pages, key);
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    GatheredKeys& keys_;
};

// By the warps that gather, 0 .. kGatherWarps - 1.
template <class Config>
__device__ void gather_pages(ForwardParams const& params, SharedStorage<Config>& shared, int warp) {
    if constexpr (Config::kGatherWarps == 1) {
        PageGatherer<Config, true, true>(params, shared, shared.gathered_keys[0]).run();
    } else if constexpr (Config::kGatherWarps == 2) {
        if (warp == 0) {
            PageGatherer<Config, true, false>(params, shared, shared.gathered_keys[0]).run();
        } else {
            PageGatherer<Config, false, true>(params, shared, shared.gathered_keys[1]).run();
        }
    }
}

// By a thread that hands a stage to the tensor core: until it is full. What has been gathered comes from the
// generic proxy.
template <class Config, int kStages>
__device__ __forceinline__ void wait_for_keys(Pipeline<kStages>& pipeline,
                                              PipelineState<kStages> const& state) {
    pipeline.wait(state);
    if constexpr (Config::kGather) {
        ptx::fence_proxy_async();
    }
}

}  // namespace flash8
