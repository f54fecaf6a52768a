// A consumer warpgroup: 64 queries of every work tile, from the first product to the store of O.

#pragma once

#include "../named_barriers.cuh"
#include "../softmax.cuh"
#include "../tile_scheduler.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "tail_rows.cuh"

namespace flash8 {

template <class Config>
class Consumer {
    using TileMask = typename Config::TileMask;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;

  public:
    __device__ Consumer(ForwardParams const& params, SharedStorage& shared, int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    __device__ void run() {
        constexpr int kWarps = Config::kConsumerWarpgroups * 4;
        int const warp = static_cast<int>(threadIdx.x / 32) - 4;
        clear_tail_rows(params_, blockIdx.x * kWarps + warp, gridDim.x * kWarps);
        if constexpr (Config::kTakeTurns) {
            Turns::start(warpgroup_);
        }
        for (WorkTile tile = next_tile(); tile.valid(); tile = next_tile()) {
            work(tile);
        }
        if constexpr (Config::kTakeTurns) {
            Turns::finish(warpgroup_);
        }
    }

  private:
    __device__ WorkTile next_tile() { return shared_.tiles.take(tiles_state_); }

    __device__ void work(WorkTile const& tile) {
        SeqlenInfo const info = SeqlenInfo::read(params_.sequences, tile.batch);
        TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        // (MMA, MMA_M, MMA_N): ((2 columns, 2 rows, kHeadDimV / 8), 1, 1)
        auto o = cute::partition_fragment_C(typename Config::MmaPV{},
                                            cute::Shape<cute::_64, cute::Int<Config::kHeadDimV>>{});
        cute::clear(o);
        // With softcap the scores are tanh of something, and the cap is their scale.
        float const scale =
            Config::kSoftcap ? params_.scores.softcap * kLog2E : params_.scores.softmax_scale_log2;
        OnlineSoftmax softmax(scale);
        int const row = first_row(tile.m_block);
        if (!blocks.empty()) {
            Scores<Config> const scores(params_, info, mask, tile, row);
            Mainloop<Config> mainloop(params_, shared_, state_, scores, warpgroup_, info.seqlen_k);
            mainloop.run(o, softmax, blocks);
        }
        Epilogue<Config>::store(params_, info, tile, row, o, softmax);
    }

    // The first of this thread's two rows.
    __device__ __forceinline__ int first_row(int m_block) const {
        int const warp = (threadIdx.x % 128) / 32;
        return m_block * Config::kBlockM + warpgroup_ * 64 + warp * 16 + (threadIdx.x % 32) / 4;
    }

    ForwardParams const& params_;
    SharedStorage& shared_;
    int warpgroup_;
    PipelineState<1> tiles_state_;
    ConsumerState<Config> state_;
};

}  // namespace flash8
