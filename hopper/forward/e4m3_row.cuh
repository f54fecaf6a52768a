// A row of O as e4m3, O ~ scale * stored, by the arithmetic of the quantizer of matrices
// (cutlass_kernels/quantize/matrix.cu): its bits are those of quantizing O in fp32 by 1x128.
//
// A quad holds a row. Of every 16 channels, a chunk, a thread has four, which make a word. Four chunks are
// transposed within the quad, so that lane q stores all of chunk 4 n + q: 16 bytes.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/quad.cuh"
#include "../clamp.cuh"
#include "../quantize/arithmetic.cuh"
#include "config.cuh"

namespace flash8 {

template <class Config>
class E4m3Row {
    static constexpr int kChunk = 16;  // channels
    static constexpr int kLanes = 4;
    static constexpr int kChunksOfScale = kOutScaleChannels / kChunk;

  public:
    static constexpr int kChunks = Config::kHeadDimV / kChunk;
    static constexpr int kScales = Config::kHeadDimV / kOutScaleChannels;
    static constexpr int kValues = 4;  // of a thread in a chunk

    // Where the accumulator has value j of a chunk. FP8, by transpose_v.cuh's order: neighbouring channels.
    // 16 bit: two neighbours in each half of the chunk.
    __device__ __forceinline__ static constexpr int index(int chunk, int r, int j) {
        int const group = 2 * chunk + (Config::kFp8 ? j % 2 : j / 2);  // of eight columns
        return 4 * group + 2 * r + (Config::kFp8 ? j / 2 : j % 2);
    }

    // FP8: the channel of value 0, before those of the others.
    __device__ __forceinline__ static int first_channel(int chunk) {
        return kChunk * chunk + kValues * static_cast<int>(threadIdx.x % kLanes);
    }

    // Row r of this thread's two; o holds O in fp32. inside: whether there is such a row. Called by whole
    // warps, since lanes exchange what they have.
    template <class Accumulator>
    __device__ static void store(OutScaleRef const& out_scale, Accumulator const& o, int r, bool inside,
                                 uint8_t* row, float* scales) {
        int const lane = threadIdx.x % kLanes;
        bool const finds_scales = out_scale.ptr != nullptr;
        float inverse = finds_scales ? 1.0f : quantize::reciprocal(checked_descale(*out_scale.given));
#pragma unroll
        for (int n = 0; n < kScales; ++n) {
            if (finds_scales) {
                float const scale = quantize::descale_of<false>(amax(o, r, n * kChunksOfScale));
                inverse = quantize::reciprocal(scale);
                if (inside && lane == 0) {
                    scales[n] = scale;
                }
            }
#pragma unroll
            for (int i = 0; i < kChunksOfScale; i += kLanes) {
                int const first = n * kChunksOfScale + i;
                uint32_t words[kLanes];
#pragma unroll
                for (int k = 0; k < kLanes; ++k) {
                    words[k] = rounded(o, r, first + k, inverse);
                }
                transpose_quad(words, lane);
                if (inside) {
                    *reinterpret_cast<uint4*>(row + kChunk * (first + lane)) = in_order(words);
                }
            }
        }
    }

  private:
    // The largest finite magnitude of the row's channels that share a scale, in all lanes of the quad.
    template <class Accumulator>
    __device__ __forceinline__ static uint32_t amax(Accumulator const& o, int r, int first) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kChunksOfScale; ++i) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                largest = max(largest, quantize::finite_magnitude(o(index(first + i, r, j))));
            }
        }
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        return max(largest, __shfl_xor_sync(0xffffffff, largest, 2));
    }

    template <class Accumulator>
    __device__ __forceinline__ static uint32_t rounded(Accumulator const& o, int r, int chunk,
                                                       float inverse) {
        float values[kValues];
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            values[j] = quantize::multiply(o(index(chunk, r, j)), inverse);
        }
        return pack_e4m3(values[0], values[1], values[2], values[3]);
    }

    // The words of the four lanes as 16 neighbouring channels.
    __device__ __forceinline__ static uint4 in_order(uint32_t const (&words)[kLanes]) {
        if constexpr (Config::kFp8) {
            return make_uint4(words[0], words[1], words[2], words[3]);
        } else {
            constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
            return make_uint4(
                __byte_perm(words[0], words[1], kLowHalves), __byte_perm(words[2], words[3], kLowHalves),
                __byte_perm(words[0], words[1], kHighHalves), __byte_perm(words[2], words[3], kHighHalves));
        }
    }
};

}  // namespace flash8
