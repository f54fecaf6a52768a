// Widens K and V of e4m3 to the 16-bit type of Q, for the 16-bit products. By all four warps of the producer
// warpgroup, a quarter of a tile's keys each.
//
//   cp.async -> narrow_k, narrow_v -> registers -> k, v -> wgmma
//
// A warp looks up where its keys are, a lane each, as page_gatherer.cuh does: a dense cache is one of a
// single page per sequence. Keys that no query of the tile sees are filled with zeros and not touched. A lane
// widens the bytes that it has copied itself: it waits for its own copies and for nobody else. The copies of
// a tile begin as soon as the lane has widened the tile before, ahead of the consumers by the two stages that
// are full then.
//
// Widened keys are written by the generic proxy. The writers fence before they arrive (Pipeline::commit), so
// consumers do not.
//
// The first warp is also the one that finds the next tile and loads Q.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/copy_async.cuh"
#include "../arch/swizzled_tile.cuh"
#include "../attention/tile_scheduler.cuh"
#include "config.cuh"
#include "producer.cuh"

namespace flash8 {

template <class Config>
class Widener {
    using Element = typename Config::Element;
    using KvState = PipelineState<Config::kStages>;
    using Scheduler =
        TileScheduler<ForwardParams, Config::kBlockM, Config::kPackGqa, 1, LongestFirst<ForwardParams>>;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kKeys = kBlockN / Config::kWidenerWarps;  // of a warp
    static_assert(kKeys <= 32 && kKeys % 8 == 0, "a lane looks up one key; swizzles repeat after eight");

  public:
    __device__ Widener(ForwardParams const& params, SharedStorage<Config>& shared, int warp)
        : params_(params), shared_(shared), keys_(shared.gathered_keys[warp]), warp_(warp) {}

    __device__ void run() {
        Scheduler scheduler(params_, shared_.packed_walk);
        WorkTile tile = leads() ? scheduler.first() : shared_.tiles.take(tiles_state_);
        while (tile.valid()) {
            publish(tile);
            load_tile(tile, scheduler);
            tile = leads() ? scheduler.next() : shared_.tiles.take(tiles_state_);
        }
        publish(tile);
    }

  private:
    // How a warp copies and widens its rows of a tile: 16 bytes a lane at a time. kLanesPerRow lanes have the
    // bytes of a row whose elements are one panel, so that the 32 bytes which each of eight lanes writes lie
    // in different banks.
    template <int kPanelElements, int kColumns>
    struct Steps {
        static constexpr int kPanelBytes = kPanelElements * sizeof(Element);
        static constexpr int kLanesPerRow = kPanelElements / 16;
        static constexpr int kRows = 32 / kLanesPerRow;
        static constexpr int kPanels = kColumns / kPanelElements;
        static constexpr int kCount = kKeys / kRows * kPanels;
        static_assert(kKeys % kRows == 0);

        // Of a step: its panel, and the first of its rows among the warp's.
        __device__ __forceinline__ static constexpr int panel(int step) { return step % kPanels; }
        __device__ __forceinline__ static constexpr int row(int step) { return step / kPanels * kRows; }
        // Where the copies of a warp lie, by step and lane.
        __device__ __forceinline__ static int narrow(int warp, int step, int lane) {
            return ((warp * kCount + step) * 32 + lane) * 16;
        }
    };
    using StepsK = Steps<Config::kPanel, Config::kHeadDim>;
    using StepsV = Steps<Config::kPanelV, Config::kHeadDimV>;

    __device__ __forceinline__ bool leads() const { return warp_ == 0; }

    // By the leading thread.
    __device__ __forceinline__ void publish(WorkTile const& tile) {
        if (threadIdx.x == 0) {
            shared_.tiles.publish(tiles_state_, tile);
        }
        __syncwarp();
    }

    // K is a block ahead of V, as consumers take them. There are at most two groups of copies under way: a
    // tile of K and one of V, of which the older one is widened next.
    //
    // Q is loaded before the first K is widened: Q is empty about when K is, and takes longer to arrive. The
    // next tile is claimed before the last V is widened, which waits until the consumers are nearly done.
    __device__ void load_tile(WorkTile const& tile, Scheduler& scheduler) {
        auto const info = SeqlenInfo::read(params_.sequences, tile.batch, tile.offset_q);
        int n_block = keys_.template enter<Config>(params_, info, tile) - 1;
        if (n_block < keys_.first_block) {
            claim(scheduler);
            return;
        }
        KeyPlace place = look_up(n_block);
        copy_k(place);
        if (threadIdx.x == 0) {
            load_query_tile(params_, shared_, q_state_, info, tile);
        }
        __syncwarp();
        KeyPlace next = look_up(n_block - 1);
        ptx::copy_async_wait<0>();
        widen_k(kv_state_);
        if (n_block > keys_.first_block) {
            copy_k(next);
        }
        copy_v(place);
#pragma unroll 1
        while (n_block > keys_.first_block) {
            --n_block;
            place = next;
            next = look_up(n_block - 1);
            KvState ahead = kv_state_;
            ahead.advance();
            ptx::copy_async_wait<1>();
            widen_k(ahead);
            if (n_block > keys_.first_block) {
                copy_k(next);
            } else {
                ptx::copy_async_commit();  // an empty group in its place
            }
            ptx::copy_async_wait<1>();
            widen_v(kv_state_);
            copy_v(place);
            kv_state_ = ahead;
        }
        claim(scheduler);
        ptx::copy_async_wait<0>();
        widen_v(kv_state_);
        kv_state_.advance();
    }

    __device__ __forceinline__ void claim(Scheduler& scheduler) {
        if (threadIdx.x == 0) {
            scheduler.claim();
        }
        __syncwarp();
    }

    // The place of this lane's key of a block.
    __device__ __forceinline__ KeyPlace look_up(int n_block) const {
        int const key = n_block * kBlockN + warp_ * kKeys + GatheredKeys::lane_index();
        return keys_.template look_up<false>(params_.pages, key);
    }

    __device__ __forceinline__ void copy_k(KeyPlace const& place) const {
        copy<StepsK>(shared_.narrow_k, params_.k, params_.head_dim, place);
    }
    __device__ __forceinline__ void copy_v(KeyPlace const& place) const {
        copy<StepsV>(shared_.narrow_v, params_.v, params_.head_dim_v, place);
    }

    // Begins to copy this warp's rows of a tile, of which `ref` has `channels`, and closes the group.
    template <class Steps>
    __device__ __forceinline__ void copy(uint8_t* narrow, TensorRef const& ref, int channels,
                                         KeyPlace const& place) const {
        int const lane = GatheredKeys::lane_index();
        int const first_byte = lane % Steps::kLanesPerRow * 16;
        uint32_t const target = ptx::shared_address(narrow) + Steps::narrow(warp_, 0, lane);
        int64_t const address = keys_.template address_of<1>(params_.pages, ref, place);
        int64_t row = 0;
#pragma unroll
        for (int step = 0; step < Steps::kCount; ++step) {
            if (Steps::panel(step) == 0) {
                row = __shfl_sync(0xffffffff, address, Steps::row(step) + lane / Steps::kLanesPerRow);
            }
            int const byte = Steps::panel(step) * Steps::kLanesPerRow * 16 + first_byte;
            bool const reads = row >= 0 && byte < channels;
            ptx::copy_async_16(target + step * 32 * 16, reinterpret_cast<void const*>(row + byte), reads);
        }
        ptx::copy_async_commit();
    }

    __device__ __forceinline__ void widen_k(KvState const& state) const {
        widen<StepsK>(shared_.pipeline_k, state, shared_.narrow_k,
                      shared_.k + state.stage * kBlockN * Config::kHeadDim);
    }
    __device__ __forceinline__ void widen_v(KvState const& state) const {
        widen<StepsV>(shared_.pipeline_v, state, shared_.narrow_v,
                      shared_.v + state.stage * kBlockN * Config::kHeadDimV);
    }

    // This warp's rows of a tile, which have been copied, into a stage.
    template <class Steps>
    __device__ __forceinline__ void widen(Pipeline<Config::kStages>& pipeline, KvState const& state,
                                          uint8_t const* narrow, Element* stage) const {
        constexpr int kInFlight = 2;  // loads before the first store
        using Tile = SwizzledTile<kBlockN, Steps::kPanelBytes>;
        int const lane = GatheredKeys::lane_index();
        uint8_t const* const source = narrow + Steps::narrow(warp_, 0, lane);
        int const first =
            Tile::offset(warp_ * kKeys + lane / Steps::kLanesPerRow, lane % Steps::kLanesPerRow * 32);
        char* const low = reinterpret_cast<char*>(stage) + first;
        char* const high = reinterpret_cast<char*>(stage) + (first ^ 16);
        pipeline.wait_empty(state);
#pragma unroll
        for (int step = 0; step < Steps::kCount; step += kInFlight) {
            uint4 words[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight && step + i < Steps::kCount; ++i) {
                words[i] = *reinterpret_cast<uint4 const*>(source + (step + i) * 32 * 16);
            }
#pragma unroll
            for (int i = 0; i < kInFlight && step + i < Steps::kCount; ++i) {
                int const offset =
                    (Steps::panel(step + i) * kBlockN + Steps::row(step + i)) * Steps::kPanelBytes;
                *reinterpret_cast<uint4*>(low + offset) = widened(words[i].x, words[i].y);
                *reinterpret_cast<uint4*>(high + offset) = widened(words[i].z, words[i].w);
            }
        }
        pipeline.commit(state);
    }

    // Eight elements.
    __device__ __forceinline__ static uint4 widened(uint32_t first, uint32_t second) {
        uint4 words;
        widen_e4m3<Element>(first, words.x, words.y);
        widen_e4m3<Element>(second, words.z, words.w);
        return words;
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    GatheredKeys& keys_;
    int warp_;
    PipelineState<1> tiles_state_;
    PipelineState<1> q_state_;
    KvState kv_state_;  // V's: K is one stage ahead inside a tile
};

}  // namespace flash8
