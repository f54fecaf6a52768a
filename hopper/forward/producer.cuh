// The producer: one warp that decides which tile comes next, and whose first lane keeps TMA busy.

#pragma once

#include "../ptx.cuh"
#include "../tile_scheduler.cuh"
#include "config.cuh"

namespace flash8 {

template <class Config>
class Producer {
    using Element = typename Config::Element;

  public:
    __device__ Producer(ForwardParams const& params, SharedStorage& shared)
        : params_(params), shared_(shared) {}

    // By the whole warp.
    __device__ void run() {
        bool const leader = threadIdx.x == 0;
        TileScheduler scheduler(params_, Config::kBlockM);
        WorkTile tile = scheduler.first();
        while (tile.valid()) {
            scheduler.draw();
            if (leader) {
                shared_.tiles.publish(tiles_state_, tile);
                load_tile(tile);
            }
            __syncwarp();
            tile = scheduler.next();
        }
        if (leader) {
            shared_.tiles.publish(tiles_state_, tile);
            // A CTA must not end while its TMA writes or its consumers' arrivals are still to come.
            shared_.pipeline_k.drain(k_state_);
            shared_.pipeline_v.drain(v_state_);
        }
    }

  private:
    // Q, then per KV block K one ahead of V: the order in which the consumers ask.
    __device__ void load_tile(WorkTile const& tile) {
        SeqlenInfo const info = SeqlenInfo::read(params_.sequences, tile.batch);
        Mask<Config::kMask, Config::kBlockM, Config::kBlockN> const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        if (blocks.empty()) {
            return;
        }
        int const head_kv = tile.head / (params_.heads_q / params_.heads_kv);
        load_q(info, tile);
        load_k(info, head_kv, blocks.end - 1);
#pragma unroll 1
        for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
            load_k(info, head_kv, n_block);
            load_v(info, head_kv, n_block + 1);
        }
        load_v(info, head_kv, blocks.begin);
    }

    __device__ void load_q(SeqlenInfo const& info, WorkTile const& tile) {
        uint64_t* const full = shared_.pipeline_q.acquire(q_state_, Config::kBytesQ);
        int const row = info.offset_q + tile.m_block * Config::kBlockM;
        load_panels<Config::kPanel, Config::kHeadDim, Config::kBlockM>(shared_.q, &params_.tma_q, full, row,
                                                                       tile.head, info.batch_q);
        q_state_.advance();
    }

    __device__ void load_k(SeqlenInfo const& info, int head, int n_block) {
        uint64_t* const full = shared_.pipeline_k.acquire(k_state_, Config::kBytesK);
        Element* const stage = shared_.k + k_state_.stage * Config::kBlockN * Config::kHeadDim;
        load_panels<Config::kPanel, Config::kHeadDim, Config::kBlockN>(
            stage, &params_.tma_k, full, info.offset_k + n_block * Config::kBlockN, head, info.batch_k);
        k_state_.advance();
    }

    __device__ void load_v(SeqlenInfo const& info, int head, int n_block) {
        uint64_t* const full = shared_.pipeline_v.acquire(v_state_, Config::kBytesV);
        Element* const stage = shared_.v + v_state_.stage * Config::kBlockN * Config::kHeadDimV;
        load_panels<Config::kPanelV, Config::kHeadDimV, Config::kBlockN>(
            stage, &params_.tma_v, full, info.offset_k + n_block * Config::kBlockN, head, info.batch_k);
        v_state_.advance();
    }

    // kRows x kColumns elements as panels of kPanel columns, one TMA box each.
    template <int kPanel, int kColumns, int kRows>
    __device__ static void load_panels(Element* target, TensorMap const* map, uint64_t* full, int row,
                                       int head, int batch) {
#pragma unroll
        for (int column = 0; column < kColumns; column += kPanel) {
            ptx::tma_load_4d(target + column * kRows, map, full, column, row, head, batch);
        }
    }

    ForwardParams const& params_;
    SharedStorage& shared_;
    PipelineState<1> tiles_state_;
    PipelineState<1> q_state_;
    PipelineState<Config::kStages> k_state_;
    PipelineState<Config::kStages> v_state_;
};

}  // namespace flash8
