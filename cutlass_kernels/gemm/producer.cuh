// The warps that fill the stages: one thread brings A and B by TMA, and with scales of blocks a second warp
// brings these. Both wait for the same empty stage, and the consumers wait for both.

#pragma once

#include "arch/copy_async.cuh"
#include "k_range.cuh"
#include "tile_walk.cuh"

namespace flash8::gemm {

// This CTA's share of B, into all CTAs of the cluster: the stage is empty in each, and each expects it.
__device__ __forceinline__ void multicast_b(GemmParams const& params, SharedStorage& shared, int stage,
                                            uint64_t* full, int k0, int n0) {
    constexpr int kRows = Config::kBlockN / Config::kClusterM;
    constexpr uint16_t kAll = (1 << Config::kClusterM) - 1;
    int const first = ptx::cluster_rank() * kRows;
    ptx::tma_multicast_4d(shared.b[stage] + first * Config::kBlockK, &params.tma_b, full, kAll, k0,
                          n0 + first, 0, 0);
}

// By one thread. With groups by a warp, whose first lane does it: the others help to find the tile, and wait
// for the first one at the next.
template <class Walk>
__device__ void load_operands(GemmParams const& params, SharedStorage& shared, Walk tiles) {
    PipelineState<Config::kStages> state;
    int const all_blocks = k_blocks(params);
    Tile tile;
    while (tiles.next(tile)) {
        if (Config::kHasGroups && threadIdx.x != 0) {
            continue;
        }
        int const blocks = k_blocks_of(tile, all_blocks);
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            int const k0 = (Config::kGroupedK ? first_k(tile) : 0) + block * Config::kBlockK;
            uint64_t* const full = acquire(shared, state, tile, k0);
            ptx::tma_load_4d(shared.a[state.stage], &params.tma_a, full, k0, tile.m0, 0, 0);
            if constexpr (Config::kGrouped) {
                ptx::tma_load_5d(shared.b[state.stage], &params.tma_b, full, k0, tile.n0, 0, 0, tile.group);
            } else if constexpr (Config::kClusterM > 1) {
                multicast_b(params, shared, state.stage, full, k0, tile.n0);
            } else {
                ptx::tma_load_4d(shared.b[state.stage], &params.tma_b, full, k0, tile.n0, 0, 0);
            }
            state.advance();
        }
    }
    if (!Config::kHasGroups || threadIdx.x == 0) {
        // Until then the other CTA's consumers, if there is one, arrive at the barriers of this one.
        shared.pipeline.drain(state);
    }
}

// By all lanes of a warp: scales of any strides, a lane copies those of every 32nd row. Rows beyond A, or
// beyond the tile's group, get the scale of the last one; nothing of them is stored.
template <class Walk>
__device__ void load_scales(GemmParams const& params, SharedStorage& shared, Walk tiles) {
    constexpr int kRows = Config::kBlockM / 32;  // of a lane
    PipelineState<Config::kStages> state;
    int const all_blocks = k_blocks(params);
    int const lane = threadIdx.x % 32;
    Tile tile;
    while (tiles.next(tile)) {
        int const blocks = k_blocks_of(tile, all_blocks);
        int rows[kRows];  // not offsets, which would not fit this warp's registers
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            rows[i] = min(tile.m0 + 32 * i + lane, tile.m_end - 1) >> params.scale_a_row_shift;
        }
        float const* of_rows = params.scale_a.ptr + tile.group * params.scale_a_group_stride;
        int const columns =
            min(tile.n0 / kScaleBlock + lane % Config::kColumnScales, (params.n - 1) / kScaleBlock);
        float const* of_columns = params.scale_b.ptr + columns * params.scale_b.row_stride +
                                  tile.group * params.scale_b_group_stride;
        if constexpr (Config::kGroupedK) {
            int const first = first_k(tile) / Config::kBlockK;
            of_rows += first * params.scale_a.block_stride;
            of_columns += first * params.scale_b.block_stride;
        }
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            shared.pipeline.wait_empty(state);
            BlockScales& scales = shared.scales[state.stage];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                ptx::copy_async_4(ptx::shared_address(&scales.a[32 * i + lane]),
                                  of_rows + rows[i] * params.scale_a.row_stride);
            }
            if (lane < Config::kColumnScales) {
                ptx::copy_async_4(ptx::shared_address(&scales.b[lane]), of_columns);
            }
            ptx::copy_async_arrive(&shared.pipeline.full[state.stage]);
            of_rows += params.scale_a.block_stride;
            of_columns += params.scale_b.block_stride;
            state.advance();
        }
    }
}

}  // namespace flash8::gemm
