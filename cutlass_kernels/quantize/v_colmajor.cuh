// A tile of column-major V, (head_dim, 128) with the keys contiguous, as FP8 products read it. It is
// transposed in shared memory. Keys and channels are permuted as by the forward kernel's own transposition
// (flash8.tensors.v_colmajor).

#pragma once

#include "rows.cuh"

namespace flash8::quantize {

// Words of four keys. The 16-byte chunks of a channel are permuted by channel / 16. So the threads of a warp
// have no bank conflicts, neither when they write words nor when they read chunks (two-way at kHeadDim 256).
struct VColMajorTile {
    static constexpr int kWords = Config::kTokens / 4;
    static constexpr int kChunks = Config::kTokens / 16;
    static constexpr int kSpread = Config::kLanes < kChunks ? kChunks / Config::kLanes : 1;

    uint32_t words[Config::kVColMajor ? Config::kHeadDim : 1][kWords];

    __device__ static int permuted(int channel, int chunk) {
        return chunk ^ (channel / Config::kChannels * kSpread % kChunks);
    }

    // Keys that do not count become zero, even where x holds NaN.
    __device__ void write(Rows const& rows, TokenTile const& tile, float inverse) {
        int const word = permuted(rows.channel, rows.group / 4) * 4 + rows.group % 4;
#pragma unroll
        for (int c = 0; c < Config::kChannels; ++c) {
            float scaled[Config::kRows];
#pragma unroll
            for (int j = 0; j < Config::kRows; ++j) {
                bool const counts = tile.first + rows.token(j) < tile.counted;
                scaled[j] = counts ? multiply(rows.x[j][c], inverse) : 0.0f;
            }
            words[rows.channel + c][word] = pack<Config::kE5m2>(scaled[0], scaled[1], scaled[2], scaled[3]);
        }
    }

    // 16-byte stores; eight neighbouring threads store the keys of a channel.
    __device__ void store(QuantizeParams const& params, TokenTile const& tile) const {
        char* const out =
            static_cast<char*>(params.out.ptr) + tile.tensor_batch(params) * params.out.batch_stride +
            tile.head * params.out.head_stride + static_cast<int64_t>(tile.block) * Config::kTokens;
#pragma unroll
        for (int i = 0; i < Config::kHeadDim * kChunks / Config::kThreads; ++i) {
            int const chunk = (threadIdx.x + i * Config::kThreads) % kChunks;
            int const channel = (threadIdx.x + i * Config::kThreads) / kChunks;
            if (channel < params.head_dim) {
                int const row = channel / 16 * 16 + channel % 2 * 8 + channel % 16 / 2;
                uint32_t const* const source = &words[channel][permuted(channel, chunk) * 4];
                *reinterpret_cast<uint4*>(out + row * params.out.row_stride + chunk * 16) =
                    *reinterpret_cast<uint4 const*>(source);
            }
        }
    }
};

}  // namespace flash8::quantize
