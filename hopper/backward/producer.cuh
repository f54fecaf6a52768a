// The roles of the producer warpgroup, each by a warp: loads; clearing of rows that belong to nobody; adding
// up staged dQ. None of them has more than 24 registers.

#pragma once

#include "../arch/ptx.cuh"
#include "config.cuh"

namespace flash8 {

// One thread keeps TMA busy: K and V once, then Q and dO of every block of queries of every query head.
template <class Config>
class Producer {
    using Element = typename Config::Element;
    using Stored = typename Config::Stored;
    using State = PipelineState<Config::kStages>;
    static constexpr int kBlockM = Config::kBlockM;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kBytesQ =
        Config::kElementsQ * (sizeof(Element) + (Config::kFp8 ? sizeof(Stored) : 0));
    static constexpr int kBlockStats = sizeof(BlockStats<kBlockM, Config::kFp8>) / sizeof(float);

  public:
    __device__ Producer(BackwardParams const& params, SharedStorage<Config>& shared)
        : params_(params), shared_(shared), tile_(shared.tile) {}

    __device__ void run() {
        if (tile_.blocks.empty()) {
            return;
        }
        load_keys();
        State state;
#pragma unroll 1
        for (int g = 0; g < tile_.group; ++g) {
            int const head = tile_.first_head + g;
#pragma unroll 1
            for (int m_block = tile_.blocks.begin; m_block < tile_.blocks.end; ++m_block) {
                load_queries(state, head, m_block);
                state.advance();
            }
        }
        // A CTA must not end while its consumers' arrivals are still to come.
        shared_.pipeline_q.drain(state);
        shared_.pipeline_do.drain(in_ring_of<Config::kStagesDo>(state));
    }

  private:
    __device__ void load_keys() {
        constexpr int kBytes = kBlockN * (Config::kHeadDim + Config::kHeadDimV) * sizeof(Stored);
        bool const ragged = !tile_.seen.template all<kBlockN>();
        uint64_t* const full = ragged ? &shared_.ragged.keys : &shared_.pipeline_kv.full[0];
        ptx::mbarrier_expect_tx(full, kBytes);
        int const row = tile_.info.offset_k + tile_.n_block * kBlockN;
        int const head = tile_.head_kv;
        int const batch = tile_.info.batch_k;
        if constexpr (Config::kFp8) {
            load<Config::kPanelQ8, Config::kHeadDim, kBlockN>(shared_.k8, &params_.tma_k, full, row, head,
                                                              batch);
            load<Config::kPanelV8, Config::kHeadDimV, kBlockN>(shared_.v8(), &params_.tma_v, full, row, head,
                                                               batch);
        } else {
            load<Config::kPanelK, Config::kHeadDim, kBlockN>(shared_.k, &params_.tma_k, full, row, head,
                                                             batch);
            load<Config::kPanelV, Config::kHeadDimV, kBlockN>(shared_.v, &params_.tma_v, full, row, head,
                                                              batch);
        }
    }

    __device__ void load_queries(State const& state, int head, int m_block) {
        bool const ragged = (m_block + 1) * kBlockM > tile_.info.seqlen_q;
        int const row = tile_.info.offset_q + m_block * kBlockM;

        uint64_t* full = ragged ? &shared_.ragged.q[state.stage] : &shared_.pipeline_q.full[state.stage];
        shared_.pipeline_q.wait_empty(state);
        ptx::mbarrier_expect_tx(full, kBytesQ + sizeof(typename Config::Rows));
        int64_t const block = head * params_.query_blocks + tile_.first_query_block + m_block;
        int const first = state.stage * Config::kElementsQ;
        if constexpr (Config::kFp8) {
            load<Config::kPanelQ8, Config::kHeadDim, kBlockM>(shared_.q8 + first, &params_.tma_q, full, row,
                                                              head, tile_.info.batch_q);
            ptx::bulk_load(shared_.q + first,
                           static_cast<Element const*>(params_.q16) + block * Config::kElementsQ,
                           Config::kElementsQ * sizeof(Element), full);
        } else {
            load<Config::kPanelQ, Config::kHeadDim, kBlockM>(shared_.q + first, &params_.tma_q, full, row,
                                                             head, tile_.info.batch_q);
        }
        ptx::bulk_load(&shared_.stats[state.stage], params_.row_stats + block * kBlockStats,
                       sizeof(typename Config::Rows), full);

        auto const state_do = in_ring_of<Config::kStagesDo>(state);
        full = ragged ? &shared_.ragged.dout[state_do.stage] : &shared_.pipeline_do.full[state_do.stage];
        shared_.pipeline_do.wait_empty(state_do);
        ptx::mbarrier_expect_tx(full, Config::kElementsDo * sizeof(Element));
        load<Config::kPanelV, Config::kHeadDimV, kBlockM>(shared_.dout + state_do.stage * Config::kElementsDo,
                                                          &params_.tma_dout, full, row, head,
                                                          tile_.info.batch_q);
    }

    template <int kPanel, int kColumns, int kRows, class T>
    __device__ static void load(T* target, TensorMap const* map, uint64_t* full, int row, int head,
                                int batch) {
#pragma unroll
        for (int column = 0; column < kColumns; column += kPanel) {
            ptx::tma_load_4d(target + column * kRows, map, full, column, row, head, batch);
        }
    }

    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    KeyTile const& tile_;
};

// A warp clears rows past the last query and keys that no query sees: they may hold anything, P is zero
// there, but 0 * NaN is NaN. The loads of a tile with such rows count on a barrier of `ragged`, for this warp
// only; the consumers' barrier completes when it has cleared them.
template <class Config>
class RaggedRows {
  public:
    __device__ static void run(SharedStorage<Config>& shared) {
        KeyTile const& tile = shared.tile;
        if (tile.blocks.empty()) {
            return;
        }
        if (!tile.seen.template all<Config::kBlockN>()) {
            ptx::mbarrier_wait(&shared.ragged.keys, 0);
            if constexpr (Config::kFp8) {
                clear<Config::kPanelQ8, Config::kHeadDim, Config::kBlockN>(shared.k8, tile.seen);
                clear<Config::kPanelV8, Config::kHeadDimV, Config::kBlockN>(shared.v8(), tile.seen);
            } else {
                clear<Config::kPanelK, Config::kHeadDim, Config::kBlockN>(shared.k, tile.seen);
                clear<Config::kPanelV, Config::kHeadDimV, Config::kBlockN>(shared.v, tile.seen);
            }
            arrive(&shared.pipeline_kv.full[0]);
        }
        SeenKeys const queries{0, tile.info.seqlen_q - (tile.blocks.end - 1) * Config::kBlockM};
        if (queries.end >= Config::kBlockM) {
            return;
        }
        int const blocks = tile.blocks.end - tile.blocks.begin;
        uint32_t parities = 0;  // one bit a stage
#pragma unroll 1
        for (int g = 0; g < tile.group; ++g) {
            int const stage = ((g + 1) * blocks - 1) % Config::kStages;
            ptx::mbarrier_wait(&shared.ragged.q[stage], parities >> stage & 1);
            // Preprocess has written 16-bit Q with zeros.
            constexpr int kPanel = Config::kFp8 ? Config::kPanelQ8 : Config::kPanelQ;
            clear<kPanel, Config::kHeadDim, Config::kBlockM>(
                shared.score_queries() + stage * Config::kElementsQ, queries);
            arrive(&shared.pipeline_q.full[stage]);
            int const stage_do = Config::kStagesDo == 1 ? 0 : stage;
            uint32_t const parity_do = Config::kStagesDo == 1 ? g : parities >> stage;
            ptx::mbarrier_wait(&shared.ragged.dout[stage_do], parity_do & 1);
            clear<Config::kPanelV, Config::kHeadDimV, Config::kBlockM>(
                shared.dout + stage_do * Config::kElementsDo, queries);
            arrive(&shared.pipeline_do.full[stage_do]);
            parities ^= 1u << stage;
        }
    }

  private:
    // All rows that are not `seen`. The swizzle permutes within rows of a panel, so whole rows stay whole.
    template <int kPanel, int kColumns, int kRows, class T>
    __device__ static void clear(T* tile, SeenKeys const& seen) {
        constexpr int kVectors = kPanel * sizeof(T) / sizeof(uint4);
        constexpr int kPanels = kColumns / kPanel;
        uint4* const vectors = reinterpret_cast<uint4*>(tile);
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < kPanels * kRows * kVectors; i += 32) {
            int const row = i / kVectors % kRows;
            if (row < seen.begin || row >= seen.end) {
                vectors[i] = make_uint4(0, 0, 0, 0);
            }
        }
        ptx::fence_proxy_async();
        __syncwarp();
    }

    __device__ static void arrive(uint64_t* full) {
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive(full);
        }
    }
};

// One thread: what the consumer warpgroups have staged goes to the workspace.
template <class Config>
class DqReducer {
    using Tiles = typename Config::Tiles;
    static constexpr int kPart = Tiles::kDqPart / Tiles::kDqSlices;  // floats of a warpgroup's slice

  public:
    __device__ static void run(BackwardParams const& params, SharedStorage<Config>& shared) {
        KeyTile const& tile = shared.tile;
        PipelineState<1> state;
#pragma unroll 1
        for (int g = 0; g < tile.group; ++g) {
            int const head = tile.first_head + g;
#pragma unroll 1
            for (int m_block = tile.blocks.begin; m_block < tile.blocks.end; ++m_block) {
                int64_t const block = head * params.query_blocks + tile.first_query_block + m_block;
                if constexpr (Config::kDeterministic) {
                    wait_for_turn(params, tile, block, m_block);
                }
#pragma unroll
                for (int slice = 0; slice < Tiles::kDqSlices; ++slice) {
                    add(params.dq_accum + block * Tiles::kDqFloats + slice * kPart, shared, state);
                    if constexpr (Config::kDeterministic) {
                        // Not when shared memory has been read: the next CTA's sums come after these.
                        ptx::bulk_wait();
                    } else {
                        ptx::bulk_wait_read();
                    }
#pragma unroll
                    for (int part = 0; part < Tiles::kWarpgroups; ++part) {
                        ptx::mbarrier_arrive(&shared.pipeline_dq[part].empty[0]);
                    }
                    state.advance();
                }
                if constexpr (Config::kDeterministic) {
                    ptx::fence_proxy_async_all();
                    ptx::add_release(params.dq_semaphore + block, 1);
                }
            }
        }
    }

  private:
    __device__ static void add(float* target, SharedStorage<Config>& shared, PipelineState<1> const& state) {
#pragma unroll
        for (int part = 0; part < Tiles::kWarpgroups; ++part) {
            shared.pipeline_dq[part].wait(state);
            ptx::bulk_reduce_add(target + part * Tiles::kDqPart, shared.dq + part * kPart,
                                 kPart * sizeof(float));
            ptx::bulk_commit();
        }
    }

    // Until all blocks of keys before this one that these queries see have added their share. CTAs of earlier
    // blocks have smaller numbers, so they run, or have run, when this one does.
    __device__ static void wait_for_turn(BackwardParams const& params, KeyTile const& tile, int64_t block,
                                         int m_block) {
        int first = 0;
        if constexpr (Config::kMask == MaskMode::kLocal) {
            Mask<Config::kMask, Config::kBlockM, Config::kBlockN> const mask(params, tile.info);
            first = max(0, mask.visible_keys(m_block * Config::kBlockM).begin) / Config::kBlockN;
        }
        while (ptx::load_acquire(params.dq_semaphore + block) != tile.n_block - first) {
        }
        ptx::fence_proxy_async_all();
    }
};

}  // namespace flash8
