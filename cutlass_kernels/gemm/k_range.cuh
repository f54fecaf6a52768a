// Groups along K: a stage of 128 of K may have K of other groups behind its own, and with scales of blocks
// before it, too. That must not get into the products, be it NaN, so it is cut off: zeroed in both operands.
//
//   TMA of a stage that is cut    counts bytes at landed[stage], not at full[stage]
//   the warp that cuts            wait landed[stage], zero what is outside, commit: arrives at full[stage]
//   consumers                     wait full[stage], as for any other
//
// landed[stage] is used again only when the stage is empty, which the consumers' wait for full comes before.
// So the warp never misses a phase of it.

#pragma once

#include "arch/swizzled_tile.cuh"
#include "tile_walk.cuh"

namespace flash8::gemm {

__device__ __forceinline__ bool is_cut(Tile const& tile, int k0) {
    return k0 < tile.k_begin || k0 + Config::kBlockK > tile.k_end;
}

// By the thread that brings A and B: waits for the stage to be empty, and gives the barrier for their bytes.
__device__ __forceinline__ uint64_t* acquire(SharedStorage& shared,
                                             PipelineState<Config::kStages> const& state, Tile const& tile,
                                             int k0) {
    constexpr int kBytes = Config::kBytesA + Config::kBytesB;
    if constexpr (Config::kGroupedK) {
        shared.pipeline.wait_empty(state);
        uint64_t* const barrier =
            is_cut(tile, k0) ? &shared.landed[state.stage] : &shared.pipeline.full[state.stage];
        ptx::mbarrier_expect_tx(barrier, kBytes);
        return barrier;
    } else {
        return shared.pipeline.acquire(state, kBytes);
    }
}

// The bytes of a word that lie in [begin, end), as a mask. Both may be anything, also beyond the word.
__device__ __forceinline__ uint32_t bytes_inside(int begin, int end) {
    auto const below = [](int count) {
        return static_cast<uint32_t>((uint64_t{1} << 8 * clamped(count, 0, 4)) - 1);
    };
    return below(end) & ~below(begin);
}

// By all lanes of a warp: of kRows rows of a stage [begin, end) stays, and the rest is zeroed. Chunks of 16
// bytes that stay whole are not touched, and those that go whole are not read.
template <int kRows>
__device__ __forceinline__ void keep(Config::Element* operand, int begin, int end) {
    static_assert(kRows % 32 == 0);
    constexpr int kChunk = 16;
    using Rows = SwizzledTile<kRows, Config::kBlockK>;
    auto* const tile = reinterpret_cast<char*>(operand);
#pragma unroll 1
    for (int byte = 0; byte < Config::kBlockK; byte += kChunk) {
        if (begin <= byte && byte + kChunk <= end) {
            continue;
        }
        bool const is_read = begin < byte + kChunk && byte < end;
        uint4 const mask = {
            bytes_inside(begin - byte, end - byte), bytes_inside(begin - byte - 4, end - byte - 4),
            bytes_inside(begin - byte - 8, end - byte - 8), bytes_inside(begin - byte - 12, end - byte - 12)};
#pragma unroll 1
        for (int row = static_cast<int>(threadIdx.x % 32); row < kRows; row += 32) {
            auto* const at = reinterpret_cast<uint4*>(tile + Rows::offset(row, byte));
            uint4 const old = is_read ? *at : make_uint4(0, 0, 0, 0);
            *at = make_uint4(old.x & mask.x, old.y & mask.y, old.z & mask.z, old.w & mask.w);
        }
    }
}

// By all lanes of a warp.
__device__ void cut_stages(GemmParams const& params, SharedStorage& shared) {
    PipelineState<Config::kStages> state;
    static_assert(Config::kStages <= 32);
    uint32_t parities = 0;  // of `landed`, a bit for each stage
    TileWalk tiles(params);
    int const all_blocks = k_blocks(params);
    Tile tile;
    while (tiles.next(tile)) {
        int const blocks = k_blocks_of(tile, all_blocks);
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            int const k0 = first_k(tile) + block * Config::kBlockK;
            if (is_cut(tile, k0)) {
                ptx::mbarrier_wait(&shared.landed[state.stage], parities >> state.stage & 1);
                parities ^= 1u << state.stage;
                keep<Config::kBlockM>(shared.a[state.stage], tile.k_begin - k0, tile.k_end - k0);
                keep<Config::kBlockN>(shared.b[state.stage], tile.k_begin - k0, tile.k_end - k0);
                shared.pipeline.commit(state);
            }
            state.advance();
        }
    }
}

}  // namespace flash8::gemm
