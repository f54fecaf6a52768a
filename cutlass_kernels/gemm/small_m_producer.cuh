// The warps that fill the stages: one thread brings A and B by TMA, and with scales of blocks a second warp
// brings these. Both wait for the same empty stage, and the consumers wait for both. A of 16 bits has a
// barrier of its own, where those wait that quantize it and make its scales.

#pragma once

#include "arch/copy_async.cuh"
#include "small_m_tile_walk.cuh"

namespace flash8::small_m {

// By one thread.
__device__ void load_operands(GemmParams const& params, SharedStorage& shared) {
    PipelineState<Config::kStages> state;
    TileWalk tiles(params);
    KBlocks const blocks = k_blocks(params);
    Tile tile;
    while (tiles.next(tile)) {
#pragma unroll 1
        for (int block = blocks.begin; block < blocks.end; ++block) {
            constexpr int kBytes = Config::kBytesB + (Config::kQuantizes ? 0 : Config::kBytesA);
            uint64_t* const full = shared.pipeline.acquire(state, kBytes);
            int const k0 = block * Config::kBlockK;
            ptx::tma_load_4d(shared.b[state.stage], &params.tma_b, full, k0, tile.n0, 0, 0);
            if constexpr (Config::kQuantizes) {
                uint64_t* const wide_full = &shared.wide.full[state.stage];
                ptx::mbarrier_expect_tx(wide_full, Config::kBytesWideA);
                ptx::tma_load_4d(shared.wide.a[state.stage], &params.tma_a, wide_full, k0, tile.m0, 0, 0);
            } else {
                ptx::tma_load_4d(shared.a[state.stage], &params.tma_a, full, k0, tile.m0, 0, 0);
            }
            state.advance();
        }
    }
}

// By all lanes of a warp: scales of any strides, a lane copies those of every 32nd row. Rows beyond A get the
// scale of its last one; nothing of them is stored.
__device__ void load_scales(GemmParams const& params, SharedStorage& shared) {
    constexpr int kRows = Config::kQuantizes ? 0 : Config::kBlockM;
    constexpr int kLaneRows = Config::kQuantizes ? 1 : (kRows + 31) / 32;
    PipelineState<Config::kStages> state;
    TileWalk tiles(params);
    KBlocks const blocks = k_blocks(params);
    int const lane = threadIdx.x % 32;
    Tile tile;
    while (tiles.next(tile)) {
        int64_t rows[kLaneRows];  // of floats from the first row's scales
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            int const row = min(tile.m0 + 32 * i + lane, params.m - 1) >> params.scale_a_row_shift;
            rows[i] = row * params.scale_a.row_stride + blocks.begin * params.scale_a.block_stride;
        }
        float const* of_rows = params.scale_a.ptr;
        float const* of_columns = params.scale_b.ptr + tile.n0 / kScaleBlock * params.scale_b.row_stride +
                                  blocks.begin * params.scale_b.block_stride;
#pragma unroll 1
        for (int block = blocks.begin; block < blocks.end; ++block) {
            shared.pipeline.wait_empty(state);
            BlockScales& scales = shared.scales[state.stage];
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                if (32 * i + lane < kRows) {
                    ptx::copy_async_4(ptx::shared_address(&scales.a[32 * i + lane]), of_rows + rows[i]);
                }
            }
            if (lane == 0) {
                ptx::copy_async_4(ptx::shared_address(&scales.b), of_columns);
            }
            ptx::copy_async_arrive(&shared.pipeline.full[state.stage]);
            of_rows += params.scale_a.block_stride;
            of_columns += params.scale_b.block_stride;
            state.advance();
        }
    }
}

}  // namespace flash8::small_m
