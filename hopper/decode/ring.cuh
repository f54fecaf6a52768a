// One warp's ring of slots, as its products see it.

#pragma once

#include "../arch/pipeline.cuh"
#include "loader.cuh"
#include "new_keys.cuh"

namespace flash8 {

template <class Config>
class Ring {
    static constexpr int kBlockN = Config::kBlockN;

  public:
    __device__ Ring(DecodeParams const& params, SharedStorage<Config>& shared, Share const& share, int warp)
        : shared_(shared), loader_(params, shared, share, warp), warp_(warp) {
        loader_.start();
    }

    // Of the slot that is next.
    __device__ __forceinline__ uint32_t address() const {
        return ptx::shared_address(shared_.slots[warp_][state_.stage]);
    }

    // With qv: of the part of K beside it.
    __device__ __forceinline__ uint32_t address_k() const {
        return ptx::shared_address(
            shared_.slot_k(warp_ / Config::kTeamWarps, warp_ % Config::kTeamWarps, state_.stage));
    }

    // By kScales, for the tile's descales of keys too, which come with K.
    template <bool kScales = false>
    __device__ __forceinline__ void wait() {
        if constexpr (kScales && !Config::kGather) {
            ptx::copy_async_wait<(Config::kSlots - 1) / 2>();
            __syncwarp();
        }
        if constexpr (Config::kGather) {
            ptx::copy_async_wait<Config::kSlots - 1>();
            __syncwarp();  // the other lanes' copies
        } else {
            ptx::mbarrier_wait(&shared_.full[warp_][state_.stage], state_.parity);
        }
    }

    // After the reads of K, or of V and whatever lies beside it. The slot is filled with what comes kSlots
    // later: K and V are by turns, but for qv.
    template <bool kV>
    __device__ __forceinline__ void release() {
        constexpr bool kSame = Config::kSlots % 2 == 0 || Config::kQv;
        loader_.template fill<kV == kSame>(state_.stage);
        state_.advance();
    }

    // Writes new keys and their values over what has been loaded of them, in the tile of K that is next and
    // in that of V behind it, for which it waits.
    __device__ __forceinline__ void patch(DecodeParams const& params, Walk<Config> const& walk,
                                          int position) {
        PipelineState<Config::kSlots> next = state_;
        next.advance();
        if constexpr (Config::kGather) {
            ptx::copy_async_wait<Config::kSlots - 2>();
            __syncwarp();  // the other lanes' copies
        } else {
            ptx::mbarrier_wait(&shared_.full[warp_][next.stage], next.parity);
        }
        NewKeys<Config>::patch(params, shared_.slots[warp_][state_.stage], shared_.slots[warp_][next.stage],
                               walk.segment, walk.sequence, position);
    }

    // Zeroes the rows of V that no query sees: P is zero there, but 0 * NaN is NaN. By gather they are not
    // read.
    __device__ void clear_hidden(SequenceWork<Config> const& sequence, int position) {
        if constexpr (Config::kGather) {
            return;
        }
        constexpr int kVectors = Config::kPanelV / 16;
        int const begin = min(max(sequence.begin - position, 0), kBlockN);
        int const end = min(max(sequence.end - position, begin), kBlockN);
        if (begin == 0 && end == kBlockN) {
            return;
        }
        uint4* const slot = reinterpret_cast<uint4*>(shared_.slots[warp_][state_.stage]);
        int const hidden = begin + kBlockN - end;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < hidden * kVectors; i += 32) {
            // The swizzle permutes within rows of a panel.
            int const vector = i < begin * kVectors ? i : i - begin * kVectors + end * kVectors;
#pragma unroll
            for (int panel = 0; panel < Config::kRowBytesV / Config::kPanelV; ++panel) {
                slot[panel * kBlockN * kVectors + vector] = make_uint4(0, 0, 0, 0);
            }
        }
        ptx::fence_proxy_async();  // before TMA fills the slot again
        __syncwarp();
    }

  private:
    SharedStorage<Config>& shared_;
    Loader<Config> loader_;
    int warp_;
    PipelineState<Config::kSlots> state_;
};

}  // namespace flash8
