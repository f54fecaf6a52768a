// The two products of a tile, with operands swapped: S^T = K Q^T and O^T += V^T P^T. Keys and channels are
// the rows of 16, rows of Q the columns of 8, so that few rows of Q waste little.
//
// Of S^T a lane (group g, place t) holds keys 16 i + g and 16 i + g + 8, of rows 8 n + 2 t and 8 n + 2 t + 1
// of Q; of O^T the same rows, and two channels.
//
// e4m3: ldmatrix moves pairs of bytes. Of K it gives a lane four neighbouring channels, two for each half of
// a step of 16; Q's fragments are laid out in the same order. Of V it gives neighbouring channels of one key;
// a byte permutation makes them neighbouring keys of one channel, and row g of the product is channel 2 g,
// row g + 8 channel 2 g + 1.

#pragma once

#include "../arch/swizzled_tile.cuh"
#include "config.cuh"

namespace flash8 {

template <class Config>
struct Products {
    static constexpr int kRowTiles = Config::kRowTiles;
    static constexpr int kKeySteps = Config::kKeySteps;
    // One ldmatrix has 16 keys x 32 bytes: a step of 16 channels, or two of e4m3.
    static constexpr int kStepsPerLoad = Config::kFp8 ? 2 : 1;
    static constexpr int kOutSteps = Config::kWarpChannelsV / 16;

    using Scores = float[kKeySteps][kRowTiles][4];
    using Weights = uint2[kKeySteps][kRowTiles];
    using Out = float[kRowTiles][kOutSteps][4];
    using Queries = uint2[kRowTiles][Config::kWarpSteps];

    // The first channel of the pair b of a lane's fragment of Q, within a step of 16.
    __device__ __forceinline__ static int q_channel(int place, int b) {
        return Config::kFp8 ? 4 * place + 2 * b : 2 * place + 8 * b;
    }

    // The channel of O that accumulator i of an out step has, within the step.
    __device__ __forceinline__ static int o_channel(int group, int i) {
        return Config::kFp8 ? 2 * group + i / 2 : group + 8 * (i / 2);
    }

    // By the channels of K, or of V. `query` (step, row tile) gives a fragment of Q.
    template <bool kV, bool kAdds, class GetQuery>
    __device__ __forceinline__ static void scores(Scores& s, uint32_t slot, GetQuery const& query) {
        constexpr int kRowBytes = kV ? Config::kRowBytesV : Config::kRowBytesK;
        constexpr int kPanel = kV ? Config::kPanelV : Config::kPanelK;
        using Tile = SwizzledTile<Config::kBlockN, kPanel>;
        float const zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        int const lane = lane_index<Config>();
        // Keys 0 to 15 of 16 bytes, then of the next 16.
        int const first = Tile::offset(lane % 16, lane / 16 * 16);
#pragma unroll
        for (int load = 0; load < kRowBytes / 32; ++load) {
            uint2 q[kStepsPerLoad][kRowTiles];
#pragma unroll
            for (int half = 0; half < kStepsPerLoad; ++half) {
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) {
                    q[half][n] = query(kStepsPerLoad * load + half, n);
                }
            }
            uint32_t const address = slot + Tile::advance(first, 32 * load);
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
                uint32_t words[4];
                ptx::load_matrices(words, address + 16 * i * kPanel);
                uint32_t a[kStepsPerLoad][4];
                if constexpr (Config::kFp8) {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        ptx::widen_e4m3(words[w], a[w / 2][w % 2], a[w / 2][w % 2 + 2]);
                    }
                } else {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        a[0][w] = words[w];
                    }
                }
#pragma unroll
                for (int half = 0; half < kStepsPerLoad; ++half) {
#pragma unroll
                    for (int n = 0; n < kRowTiles; ++n) {
                        float (&sums)[4] = s[i][n];
                        if (!kAdds && load + half == 0) {
                            ptx::mma_m16n8k16<Config::kArithmetic>(sums, a[half], q[half][n], zeros);
                        } else {
                            ptx::mma_m16n8k16<Config::kArithmetic>(sums, a[half], q[half][n], sums);
                        }
                    }
                }
            }
        }
    }

    __device__ __forceinline__ static void out(Out& o, uint32_t slot, Weights const& p) {
        using Tile = SwizzledTile<Config::kBlockN, Config::kPanelV>;
        int const lane = lane_index<Config>();
        // Keys 0 to 7 of 32 bytes, then the next 8 keys: as the registers of the first operand lie.
        int const first = Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16);
#pragma unroll
        for (int load = 0; load < Config::kRowBytesV / 32; ++load) {
            uint32_t const address = slot + Tile::advance(first, 32 * load);
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
                uint32_t words[4];
                ptx::load_matrices_transposed(words, address + 16 * i * Config::kPanelV);
                uint32_t a[kStepsPerLoad][4];
                if constexpr (Config::kFp8) {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        uint32_t const by_channel = __byte_perm(words[w], 0, 0x3120);
                        ptx::widen_e4m3(by_channel, a[w % 2][w / 2 * 2], a[w % 2][w / 2 * 2 + 1]);
                    }
                } else {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        a[0][w] = words[w];
                    }
                }
#pragma unroll
                for (int half = 0; half < kStepsPerLoad; ++half) {
#pragma unroll
                    for (int n = 0; n < kRowTiles; ++n) {
                        float (&sums)[4] = o[n][kStepsPerLoad * load + half];
                        ptx::mma_m16n8k16<Config::kArithmetic>(sums, a[half], p[i][n], sums);
                    }
                }
            }
        }
    }
};

}  // namespace flash8
