// The producer: one warp that decides which tile comes next, and whose first lane keeps TMA busy.

#pragma once

#include "../ptx.cuh"
#include "../tile_scheduler.cuh"
#include "config.cuh"
#include "query_row.cuh"

namespace flash8 {

template <class Config>
class Producer {
    using Element = typename Config::Element;

  public:
    __device__ Producer(ForwardParams const& params, SharedStorage<Config>& shared)
        : params_(params), shared_(shared) {}

    // By the whole warp.
    __device__ void run() {
        bool const leader = threadIdx.x == 0;
        TileScheduler<Config::kBlockM, Config::kPackGqa, Config::kClusterM> scheduler(params_);
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
            shared_.pipeline_k.drain(kv_state_);
            if constexpr (Config::kFp8) {
                shared_.pipeline_v_rows.drain(kv_state_);
            } else {
                shared_.pipeline_v.drain(kv_state_);
            }
        }
    }

  private:
    // Q, then per KV block K one ahead of V: the order in which the consumers ask.
    __device__ void load_tile(WorkTile const& tile) {
        SeqlenInfo const info = SeqlenInfo::read(params_.sequences, tile.batch);
        typename Config::TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(first_of_cluster<Config::kClusterM>(tile));
        if (blocks.empty()) {
            return;
        }
        int const head_kv = kv_head<Config::kPackGqa>(params_, tile);
        load_q(info, tile);
        load_k(kv_state_, info, head_kv, blocks.end - 1);
#pragma unroll 1
        for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
            PipelineState<Config::kStages> ahead = kv_state_;
            ahead.advance();
            load_k(ahead, info, head_kv, n_block);
            load_v(kv_state_, info, head_kv, n_block + 1);
            kv_state_ = ahead;
        }
        load_v(kv_state_, info, head_kv, blocks.begin);
        kv_state_.advance();
    }

    __device__ void load_q(SeqlenInfo const& info, WorkTile const& tile) {
        uint64_t* const full = shared_.pipeline_q.acquire(q_state_, Config::kBytesQ);
        if constexpr (Config::kPackGqa) {
            // The map is (head_dim, ratio, row, KV head, batch), its box all heads of kBlockM / ratio
            // queries.
            int const queries = Config::kBlockM / (params_.heads_q / params_.heads_kv);
#pragma unroll
            for (int column = 0; column < Config::kHeadDim; column += Config::kPanel) {
                ptx::tma_load_5d(shared_.q + column * Config::kBlockM, &params_.tma_q, full, column, 0,
                                 info.offset_q + tile.m_block * queries, tile.head, info.batch_q);
            }
        } else {
            int const row = info.offset_q + tile.m_block * Config::kBlockM;
            load_panels<Config::kPanel, Config::kHeadDim, Config::kBlockM>(shared_.q, &params_.tma_q, full,
                                                                           row, tile.head, info.batch_q);
        }
        q_state_.advance();
    }

    using KvState = PipelineState<Config::kStages>;

    __device__ void load_k(KvState const& state, SeqlenInfo const& info, int head, int n_block) {
        load_keys<Config::kPanel, Config::kHeadDim>(shared_.pipeline_k, state, shared_.k, &params_.tma_k,
                                                    info, head, n_block);
    }

    // FP8: to the warps that transpose it.
    __device__ void load_v(KvState const& state, SeqlenInfo const& info, int head, int n_block) {
        if constexpr (Config::kFp8) {
            load_keys<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v_rows, state, shared_.v_rows,
                                                          &params_.tma_v, info, head, n_block);
        } else {
            load_keys<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v, state, shared_.v,
                                                          &params_.tma_v, info, head, n_block);
        }
    }

    // A KV tile of this CTA, of which a cluster's CTAs load a share each and send it to all. A stage is empty
    // when the consumers of all of them have released it; it is full when all bytes have come.
    template <int kPanel, int kColumns>
    __device__ static void load_keys(Pipeline<Config::kStages>& pipeline, KvState const& state,
                                     Element* stages, TensorMap const* map, SeqlenInfo const& info, int head,
                                     int n_block) {
        constexpr int kElements = Config::kBlockN * kColumns;
        uint64_t* const full = pipeline.acquire(state, kElements * sizeof(Element));
        Element* const stage = stages + state.stage * kElements;
        int const row = info.offset_k + n_block * Config::kBlockN;
        if constexpr (Config::kClusterM == 1) {
            load_panels<kPanel, kColumns, Config::kBlockN>(stage, map, full, row, head, info.batch_k);
        } else {
            constexpr uint16_t kAll = (1 << Config::kClusterM) - 1;
            int const share = ptx::cluster_rank() * (Config::kBlockN / Config::kClusterM);
#pragma unroll
            for (int column = 0; column < kColumns; column += kPanel) {
                ptx::tma_multicast_4d(stage + column * Config::kBlockN + share * kPanel, map, full, kAll,
                                      column, row + share, head, info.batch_k);
            }
        }
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
    SharedStorage<Config>& shared_;
    PipelineState<1> tiles_state_;
    PipelineState<1> q_state_;
    PipelineState<Config::kStages> kv_state_;  // V's: K is one stage ahead inside a tile
};

}  // namespace flash8
