// The values of a tile in registers, and the steps before the scale: position, mean, rotation.

#pragma once

#include "quantize/arithmetic.cuh"
#include "quantize/elements.cuh"
#include "tokens.cuh"

namespace flash8::quantize {

// Eight neighbouring channels, widened.
__device__ __forceinline__ void load_group(void const* x, int64_t element, float (&values)[kGroup]) {
    if constexpr (Config::kInput == Input::kFp32) {
        load_floats(static_cast<float const*>(x) + element, values);
    } else {
        uint4 const raw = *reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(x) + element);
        uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = widen<Config::kInput>(words[i] & 0xffff);
            values[2 * i + 1] = widen<Config::kInput>(words[i] >> 16);
        }
    }
}

// x H / sqrt(block) after the signs: sums and differences of channels that are 1, 2, 4, ... apart. Channels
// of other threads come by shuffles. All lanes of the warp call it.
template <int kCount>
__device__ __forceinline__ void rotate(QuantizeParams const& params, int lane,
                                       float (&x)[kCount][Config::kChannels]) {
    uint32_t const signs = params.hadamard_signs[lane / 2] >> (lane % 2 * Config::kChannels);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int c = 0; c < Config::kChannels; ++c) {
            x[j][c] = __uint_as_float(__float_as_uint(x[j][c]) ^ (signs >> c << 31));
        }
#pragma unroll
        for (int size = 1; size < Config::kChannels; size *= 2) {
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                if ((c & size) == 0) {
                    float const first = x[j][c];
                    float const second = x[j][c + size];
                    x[j][c] = add(first, second);
                    x[j][c + size] = subtract(first, second);
                }
            }
        }
    }
#pragma unroll
    for (int step = 1; step < Config::kLanes; step *= 2) {
        if (step * Config::kChannels >= params.hadamard_block) {
            break;
        }
        // Times 1 is exact, so this is the sum or the difference, rounded once.
        float const sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                float const other = __shfl_xor_sync(0xffffffff, x[j][c], step);
                x[j][c] = multiply_add(x[j][c], sign, other);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int c = 0; c < Config::kChannels; ++c) {
            x[j][c] = multiply(x[j][c], params.hadamard_scale);
        }
    }
}

// The sixteen bytes of a row that a thread has.
__device__ __forceinline__ uint4 pack_row(float const (&x)[Config::kChannels], float inverse) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = pack<Config::kE5m2>(multiply(x[4 * i], inverse), multiply(x[4 * i + 1], inverse),
                                       multiply(x[4 * i + 2], inverse), multiply(x[4 * i + 3], inverse));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Thread t holds channels 16 (t % kLanes) and up of four tokens.
struct Rows {
    float x[Config::kRows][Config::kChannels];
    int lane;   // of the threads that hold a token
    int group;  // of tokens
    int channel;
    bool inside;  // whether the head has these channels

    __device__ explicit Rows(QuantizeParams const& params)
        : lane(threadIdx.x % Config::kLanes),
          group(threadIdx.x / Config::kLanes),
          channel(lane * Config::kChannels),
          inside(channel < params.head_dim) {}

    // The token, within the tile, of row j. Column-major tiles permute every 16 keys into the order in which
    // a thread has the columns of P for wgmma: place 4 q + r holds key 2 q + r % 2 + 8 (r / 2).
    __device__ int token(int j) const {
        if constexpr (Config::kVColMajor) {
            return group / 4 * 16 + group % 4 * 2 + j % 2 + j / 2 * 8;
        } else {
            return group * Config::kRows + j;
        }
    }

    // Without a branch, so that all loads are issued before the first is waited for. Threads without a token
    // or channel of their own read another one, and what they read is neither counted nor stored.
    __device__ void load(QuantizeParams const& params, TokenTile const& tile) {
        if (tile.empty()) {
#pragma unroll
            for (int i = 0; i < Config::kRows * Config::kChannels; ++i) {
                x[i / Config::kChannels][i % Config::kChannels] = 0.0f;
            }
            return;
        }
        int const readable = min(channel, params.head_dim - Config::kChannels);
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
            int64_t const element = element_of(params, tile, readable_row(tile, j)) + readable;
            load_group(params.x.ptr, element, groups(j)[0]);
            load_group(params.x.ptr, element + kGroup, groups(j)[1]);
        }
    }

    // (first, second) becomes (first cos - second sin, first sin + second cos). All lanes of the warp call
    // it.
    __device__ void embed_position(QuantizeParams const& params, TokenTile const& tile) {
        if (tile.empty()) {
            return;
        }
        int64_t const start = params.rope_offsets != nullptr ? params.rope_offsets[tile.batch] : 0;
        int64_t const last = params.rope_rows - 1;
        int const half = params.rotary_dim / 2;
        bool const turns = channel < params.rotary_dim;
        bool const first = channel < half;
        // Bits instead of a condition. The compiler could branch on a condition, with a shuffle in either
        // branch, and lanes would wait for each other in different places.
        uint32_t turned_bits = turns ? 0xffffffff : 0;
        asm("" : "+r"(turned_bits));
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
            int64_t const position = max(int64_t{0}, min(start + readable_row(tile, j), last));
            int64_t const table = position * half;
            if (!params.interleaved) {
                int const entry = !turns ? 0 : first ? channel : channel - half;
                int const partner = !turns ? 0 : first ? half : -half;
                turn_halves(params, table + entry, partner / Config::kChannels, turned_bits, first, x[j]);
            } else if (turns) {
                turn_neighbours(params, table + channel / 2, x[j]);
            }
        }
    }

    __device__ void subtract_mean(QuantizeParams const& params, TokenTile const& tile) {
        float mean[1][Config::kChannels];
        load_mean(params, tile, mean[0]);
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                x[j][c] = subtract(x[j][c], mean[0][c]);
            }
        }
    }

    // The mean of a sequence in the basis of its data, by the sequence's first tile.
    __device__ void store_rotated_mean(QuantizeParams const& params, TokenTile const& tile) const {
        RowRef const& target = params.mean_rotated;
        bool const shared_by_batch = target.batch_stride == 0 && tile.batch > 0;
        if (threadIdx.x >= 32 || tile.first != 0 || shared_by_batch) {
            return;
        }
        float mean[1][Config::kChannels];
        load_mean(params, tile, mean[0]);
        rotate(params, lane, mean);
        if (group == 0 && inside) {
            float* const out =
                target.ptr + tile.batch * target.batch_stride + tile.head * target.head_stride + channel;
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                out[c] = mean[0][c];
            }
        }
    }

    // What a mean is taken of.
    __device__ void load_in_position(QuantizeParams const& params, TokenTile const& tile) {
        load(params, tile);
        if (params.rope_cos != nullptr) {
            embed_position(params, tile);
        }
    }

    // Everything before the scale.
    __device__ void prepare(QuantizeParams const& params, TokenTile const& tile) {
        load_in_position(params, tile);
        if (params.mean.ptr != nullptr) {
            subtract_mean(params, tile);
        }
        if (params.hadamard_block != 0) {
            rotate(params, lane, x);
        }
    }

    // The largest finite magnitude of the tokens that count, as bits; bits have the order of magnitudes.
    __device__ uint32_t amax(TokenTile const& tile) const {
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
            float of_row = 0.0f;
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                of_row = larger_magnitude(of_row, x[j][c]);
            }
            largest = larger_magnitude(largest, counts(tile, j) ? of_row : 0.0f);
        }
        uint32_t const bits = __float_as_uint(largest);
        return bits < kInfinity ? bits : finite_amax(tile);
    }

    // Whether row j counts for amax and mean.
    __device__ bool counts(TokenTile const& tile, int j) const {
        return inside && tile.first + token(j) < tile.counted;
    }

  private:
    // The same if a value is infinite.
    __device__ uint32_t finite_amax(TokenTile const& tile) const {
        uint32_t largest = 0;
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
#pragma unroll
            for (int c = 0; c < Config::kChannels; ++c) {
                largest = max(largest, counts(tile, j) ? finite_magnitude(x[j][c]) : 0);
            }
        }
        return largest;
    }

    using Groups = float[Config::kChannels / kGroup][kGroup];

    __device__ Groups& groups(int j) { return reinterpret_cast<Groups&>(x[j]); }

    // Row j of this thread, or the last one of the sequence.
    __device__ int readable_row(TokenTile const& tile, int j) const {
        return min(tile.first + token(j), tile.capacity - 1);
    }

    // The element of channel 0.
    __device__ int64_t element_of(QuantizeParams const& params, TokenTile const& tile, int row) const {
        return tile.tensor_batch(params) * params.x.batch_stride + (tile.offset + row) * params.x.row_stride +
               tile.head * params.x.head_stride;
    }

    __device__ void load_mean(QuantizeParams const& params, TokenTile const& tile,
                              float (&mean)[Config::kChannels]) const {
        int const readable = min(channel, params.head_dim - Config::kChannels);
        float const* const source = params.mean.ptr + tile.batch * params.mean.batch_stride +
                                    tile.head * params.mean.head_stride + readable;
        load_floats(source, reinterpret_cast<Groups&>(mean)[0]);
        load_floats(source + kGroup, reinterpret_cast<Groups&>(mean)[1]);
    }

    __device__ static void turn_neighbours(QuantizeParams const& params, int64_t table,
                                           float (&y)[Config::kChannels]) {
        float cos[kGroup];
        float sin[kGroup];
        load_floats(params.rope_cos + table, cos);
        load_floats(params.rope_sin + table, sin);
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
            float const first = y[2 * c];
            float const second = y[2 * c + 1];
            y[2 * c] = subtract(multiply(first, cos[c]), multiply(second, sin[c]));
            y[2 * c + 1] = add(multiply(first, sin[c]), multiply(second, cos[c]));
        }
    }

    // The other half of each pair is `partner` lanes further.
    __device__ static void turn_halves(QuantizeParams const& params, int64_t table, int partner,
                                       uint32_t turned_bits, bool first, float (&y)[Config::kChannels]) {
        // Times -1 is exact: the first half is y cos + (-other) sin.
        float const sign = first ? -1.0f : 1.0f;
#pragma unroll
        for (int begin = 0; begin < Config::kChannels; begin += kGroup) {
            float cos[kGroup];
            float sin[kGroup];
            load_floats(params.rope_cos + table + begin, cos);
            load_floats(params.rope_sin + table + begin, sin);
#pragma unroll
            for (int c = 0; c < kGroup; ++c) {
                float& own = y[begin + c];
                float const other = __shfl_sync(0xffffffff, own, threadIdx.x + partner);
                float const turned = multiply_add(multiply(other, sin[c]), sign, multiply(own, cos[c]));
                own = __uint_as_float((__float_as_uint(turned) & turned_bits) |
                                      (__float_as_uint(own) & ~turned_bits));
            }
        }
    }
};

}  // namespace flash8::quantize
