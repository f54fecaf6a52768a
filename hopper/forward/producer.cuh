// The producer: one warp that finds the next tile, and whose first lane issues TMA.

#pragma once

#include "../arch/ptx.cuh"
#include "../attention/pack_gqa.cuh"
#include "../attention/tile_scheduler.cuh"
#include "config.cuh"
#include "page_loader.cuh"

#include <type_traits>

namespace flash8 {

// Q of a work tile, by one thread.
template <class Config>
__device__ __forceinline__ void load_query_tile(ForwardParams const& params, SharedStorage<Config>& shared,
                                                PipelineState<1>& state, SeqlenInfo const& info,
                                                WorkTile const& tile) {
    uint64_t* const full = shared.pipeline_q.acquire(state, Config::kBytesQ);
    int const ratio = Config::kPackGqa ? params.heads_q / params.heads_kv : 1;
    int const row = info.offset_q + tile.m_block * (Config::kBlockM / ratio);
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += Config::kPanel) {
        typename Config::Element* const target = shared.q + column * Config::kBlockM;
        if constexpr (Config::kPackGqa) {
            // The map is (head_dim, ratio, row, KV head, batch), its box all heads of kBlockM / ratio
            // queries.
            ptx::tma_load_5d(target, &params.tma_q, full, column, 0, row, tile.head, info.batch_q);
        } else {
            ptx::tma_load_4d(target, &params.tma_q, full, column, row, tile.head, info.batch_q);
        }
    }
    state.advance();
}

template <class Config>
class Producer {
    using Element = typename Config::Element;

  public:
    __device__ Producer(ForwardParams const& params, SharedStorage<Config>& shared)
        : params_(params), shared_(shared) {}

    // By the whole warp.
    __device__ void run() {
        bool const leader = threadIdx.x == 0;
        Scheduler scheduler(params_, shared_.packed_walk);
        WorkTile tile = scheduler.first();
        while (tile.valid()) {
            if (leader) {
                shared_.tiles.publish(tiles_state_, tile);
                if constexpr (Config::kGather) {
                    follow_gathered_tile(tile, scheduler);
                } else if constexpr (!Config::kPaged) {
                    load_tile(tile, scheduler);
                }
            }
            if constexpr (Config::kPaged && !Config::kGather) {
                load_tile_of_pages(tile, scheduler, leader);
            }
            __syncwarp();
            tile = scheduler.next();
        }
        if (leader) {
            shared_.tiles.publish(tiles_state_, tile);
            // A CTA must not end before its TMA writes and its consumers' arrivals.
            if constexpr (!Config::kGather) {
                shared_.pipeline_k.drain(kv_state_);
            }
            shared_.pipeline_of_v().drain(kv_state_);
        }
    }

  private:
    // A cluster's sequences have one length.
    using Order =
        std::conditional_t<Config::kClusterM == 1, LongestFirst<ForwardParams>, BatchOrder<ForwardParams>>;
    using Scheduler =
        TileScheduler<ForwardParams, Config::kBlockM, Config::kPackGqa, Config::kClusterM, Order>;

    // The first K, then Q, then K of every KV block one ahead of V. The consumers release a stage of K long
    // before they release the Q of their tile, so the next tile's first K waits less than its Q.
    //
    // The next tile is claimed just before the last load, which waits until the consumers are nearly done
    // with this tile. A tile that is claimed earlier waits, while an idle CTA could have it.
    __device__ void load_tile(WorkTile const& tile, Scheduler& scheduler) {
        auto const info = sequence_of<Config>(params_, tile);
        typename Config::TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(first_of_cluster<Config::kClusterM>(tile));
        if (blocks.empty()) {
            scheduler.claim();
            return;
        }
        int const head_kv = kv_head<Config::kPackGqa>(params_, tile);
        load_k(kv_state_, info, tile.batch, head_kv, blocks.end - 1, blocks.end - 1);
        load_q(info, tile);
#pragma unroll 1
        for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
            PipelineState<Config::kStages> ahead = kv_state_;
            ahead.advance();
            load_k(ahead, info, tile.batch, head_kv, n_block, blocks.end - 1);
            load_v(kv_state_, info, tile.batch, head_kv, n_block + 1);
            kv_state_ = ahead;
        }
        scheduler.claim();
        load_v(kv_state_, info, tile.batch, head_kv, blocks.begin);
        kv_state_.advance();
    }

    // K and V are gathered by other warps. The next tile is claimed when the last V of this one can be.
    __device__ void follow_gathered_tile(WorkTile const& tile, Scheduler& scheduler) {
        auto const info = sequence_of<Config>(params_, tile);
        typename Config::TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        if (!blocks.empty()) {
            load_q(info, tile);
        }
        // A stage is full only when this thread has arrived, too. So it misses no phase of an empty one.
#pragma unroll 1
        for (int count = blocks.end - blocks.begin; count > 0; --count) {
            shared_.pipeline_of_v().wait_empty(kv_state_);
            ptx::mbarrier_arrive(&shared_.pipeline_of_v().full[kv_state_.stage]);
            kv_state_.advance();
        }
        scheduler.claim();
    }

    // The same from pages, by the whole warp. The entries of the page table are read a tile before their
    // keys.
    __device__ void load_tile_of_pages(WorkTile const& tile, Scheduler& scheduler, bool leader) {
        auto const info = sequence_of<Config>(params_, tile);
        typename Config::TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        if (blocks.empty()) {
            if (leader) {
                scheduler.claim();
            }
            return;
        }
        PageLoader<Config> const loader(params_, info, blocks, kv_head<Config::kPackGqa>(params_, tile));
        KeyPlace place = loader.look_up(blocks.end - 1);
        KeyPlace next = loader.look_up(blocks.end - 2);
        load_k(kv_state_, loader, place);
        if (leader) {
            load_q(info, tile);
        }
#pragma unroll 1
        for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
            PipelineState<Config::kStages> ahead = kv_state_;
            ahead.advance();
            load_k(ahead, loader, next);
            KeyPlace const second = loader.look_up(n_block - 1);
            load_v(kv_state_, loader, place);
            place = next;
            next = second;
            kv_state_ = ahead;
        }
        if (leader) {
            scheduler.claim();
        }
        load_v(kv_state_, loader, place);
        kv_state_.advance();
    }

    __device__ void load_q(SeqlenInfo const& info, WorkTile const& tile) {
        load_query_tile(params_, shared_, q_state_, info, tile);
    }

    using KvState = PipelineState<Config::kStages>;

    // last: the tile's first block to be loaded.
    __device__ void load_k(KvState const& state, SeqlenInfo const& info, int batch, int head, int n_block,
                           int last) {
        if constexpr (Config::kOverlapPV && Config::kBlockScales) {
            bool const packed = params_.sequences.cu_seqlens_k != nullptr;
            float const k = KeyDescale<true>(params_.k_descale, info, packed, batch, head).of(n_block);
            KeyDescale<true> const v(params_.v_descale, info, packed, batch, head);
            float const ratio = n_block == last ? 1.0f : __fdividef(v.of(n_block + 1), v.of(n_block));
            // Consumers see them with the phase at which `acquire` arrives.
            shared_.pipeline_k.wait_empty(state);
            shared_.descales[state.stage] = {k, ratio};
        }
        load_keys<Config::kPanel, Config::kHeadDim>(shared_.pipeline_k, state, shared_.k, &params_.tma_k,
                                                    info, head, n_block);
    }

    __device__ __forceinline__ void load_k(KvState const& state, PageLoader<Config> const& loader,
                                           KeyPlace const& place) {
        loader.template load<Config::kPanel, Config::kHeadDim>(shared_.pipeline_k, state, shared_.k,
                                                               &params_.tma_k, place);
    }

    __device__ __forceinline__ void load_v(KvState const& state, PageLoader<Config> const& loader,
                                           KeyPlace const& place) {
        if constexpr (Config::kTransposeV) {
            loader.template load<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v_rows, state,
                                                                     shared_.v_rows, &params_.tma_v, place);
        } else {
            loader.template load<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v, state, shared_.v,
                                                                     &params_.tma_v, place);
        }
    }

    // For the consumers, or for the warps that transpose it for them.
    __device__ void load_v(KvState const& state, SeqlenInfo const& info, int batch, int head, int n_block) {
        if constexpr (Config::kVColMajor) {
            load_v_colmajor(state, info, batch, head, n_block);
        } else if constexpr (Config::kTransposeV) {
            load_keys<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v_rows, state, shared_.v_rows,
                                                          &params_.tma_v, info, head, n_block);
        } else {
            load_keys<Config::kPanelV, Config::kHeadDimV>(shared_.pipeline_v, state, shared_.v,
                                                          &params_.tma_v, info, head, n_block);
        }
    }

    // Column-major V, as the quantizer writes it: keys run along the box's rows, and every packed sequence
    // starts with a block.
    __device__ void load_v_colmajor(KvState const& state, SeqlenInfo const& info, int batch, int head,
                                    int n_block) {
        uint64_t* const full = shared_.pipeline_v.acquire(state, Config::kBytesV);
        Element* const stage = shared_.v + state.stage * Config::kElementsV;
        bool const packed = params_.sequences.cu_seqlens_k != nullptr;
        int const start = packed ? first_block(info, batch) * kScaleBlock : 0;
        int const first = start + n_block * Config::kBlockN;
        // Each CTA of a cluster loads a share of the channels.
        constexpr int kShare = Config::kHeadDimV / Config::kClusterM;
        int const channel = Config::kClusterM == 1 ? 0 : ptx::cluster_rank() * kShare;
#pragma unroll
        for (int key = 0; key < Config::kKeysVt; key += Config::kPanelVt) {
            load_box(stage + key * Config::kHeadDimV + channel * Config::kPanelVt, &params_.tma_v, full,
                     first + key, channel, head, info.batch_k);
        }
    }

    // A KV tile. Each CTA of a cluster loads a share of it and multicasts that to all of them. A stage is
    // empty once the consumers of all these CTAs have released it; it is full once all bytes have arrived.
    template <int kPanel, int kColumns>
    __device__ static void load_keys(Pipeline<Config::kStages>& pipeline, KvState const& state,
                                     Element* stages, TensorMap const* map, SeqlenInfo const& info, int head,
                                     int n_block) {
        constexpr int kElements = Config::kBlockN * kColumns;
        uint64_t* const full = pipeline.acquire(state, kElements * sizeof(Element));
        Element* const stage = stages + state.stage * kElements;
        int const row = info.offset_k + n_block * Config::kBlockN;
        int const share =
            Config::kClusterM == 1 ? 0 : ptx::cluster_rank() * (Config::kBlockN / Config::kClusterM);
#pragma unroll
        for (int column = 0; column < kColumns; column += kPanel) {
            load_box(stage + column * Config::kBlockN + share * kPanel, map, full, column, row + share, head,
                     info.batch_k);
        }
    }

    // Into all CTAs of the cluster.
    __device__ __forceinline__ static void load_box(Element* target, TensorMap const* map, uint64_t* full,
                                                    int c0, int c1, int c2, int c3) {
        if constexpr (Config::kClusterM == 1) {
            ptx::tma_load_4d(target, map, full, c0, c1, c2, c3);
        } else {
            constexpr uint16_t kAll = (1 << Config::kClusterM) - 1;
            ptx::tma_multicast_4d(target, map, full, kAll, c0, c1, c2, c3);
        }
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    PipelineState<1> tiles_state_;
    PipelineState<1> q_state_;
    PipelineState<Config::kStages> kv_state_;  // V's: K is one stage ahead inside a tile
};

}  // namespace flash8
