// FP8 with K - mean(K) (smooth_k): every score of a row is too small by softmax_scale * q . k_mean. That does
// not change the softmax, but it changes LSE and the weight of a sink.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/swizzled_tile.cuh"
#include "../attention/pack_gqa.cuh"
#include "../attention/softmax.cuh"
#include "config.cuh"

namespace flash8 {

// The difference for this thread's two rows, in natural log units, from Q in shared memory. All lanes of a
// quad get it. tile_row: the first of the two rows in the tile. log2_scale: softmax_scale * log2(e) * Q's
// descale.
template <class Config>
__device__ void score_shift(float (&shift)[kRowsPerThread], void const* q, float const* k_mean, int head_dim,
                            int tile_row, float const (&log2_scale)[kRowsPerThread]) {
    using TileQ = SwizzledTile<Config::kBlockM, Config::kPanel>;
    constexpr int kPiece = 8;  // bytes, of which the lanes of a quad take every fourth
    int const lane = threadIdx.x % 4;
    float sum[kRowsPerThread] = {0.0f, 0.0f};
#pragma unroll 1
    for (int column = kPiece * lane; column < head_dim; column += 4 * kPiece) {
        float mean[kPiece];
#pragma unroll
        for (int c = 0; c < kPiece; ++c) {
            mean[c] = __ldg(k_mean + column + c);
        }
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            // The swizzle repeats after eight rows, and the rows of a tile are not negative: so this takes no
            // register between tiles.
            int const first = TileQ::offset(tile_row & 255, column);
            char const* const piece = static_cast<char const*>(q) + first + 8 * r * Config::kPanel;
            uint2 const words = *reinterpret_cast<uint2 const*>(piece);
            float values[kPiece];
            unpack_e4m3(words.x, values);
            unpack_e4m3(words.y, values + 4);
#pragma unroll
            for (int c = 0; c < kPiece; ++c) {
                sum[r] += values[c] * mean[c];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
        shift[r] = quad_sum(sum[r]) * (log2_scale[r] * kLn2);
    }
}

}  // namespace flash8
