// What the threads of a row hold of it: chunks of sixteen columns in turn, in fp32, as they are quantized.
//
// A span is what they hold at a time, kChunks of each. A row of one span is read once. Of a longer one every
// step reads all spans again: the sum of squares, the amax of a row, and the cast.

#pragma once

#include "matrix_chunk.cuh"
#include "quantize/arithmetic.cuh"

namespace flash8::quantize {

// gate * sigmoid(gate). The exponential and the reciprocal are approximate, within a few last places where
// the gate is not far below zero; NaN and infinities are those of gate / (1 + exp(-gate)).
__device__ __forceinline__ float silu(float gate) {
    constexpr float kLog2E = 1.44269504f;
    float power;
    float sigmoid;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(multiply(gate, -kLog2E)));
    asm("rcp.approx.f32 %0, %1;" : "=f"(sigmoid) : "f"(add(1.0f, power)));
    return multiply(gate, sigmoid);
}

struct MatrixRow {
    using Config = MatrixConfig;
    static constexpr int kColumns = Config::kColumns;
    static constexpr int kChunks = Config::kChunks;
    // Where there is no residual, -0 is added to x, which leaves every x as it is.
    static constexpr uint32_t kMinusZero = Config::kInput == Input::kFp32 ? 0x80000000 : 0x80008000;
    static constexpr uint32_t kNothing = Config::kNorm ? kMinusZero : 0;

    QuantizeMatrixParams const& params;
    int index;  // of the row
    int end;    // its columns; 0 of a row that does not exist
    float inverse_rms = 1.0f;
    float y[kChunks][kColumns];

    __device__ explicit MatrixRow(QuantizeMatrixParams const& params)
        : params(params),
          index(blockIdx.x * (Config::kThreads / params.row_threads) + threadIdx.x / params.row_threads),
          end(index < params.rows ? params.columns : 0) {}

    // Of the threads that share the row.
    __device__ int lane() const { return threadIdx.x & (params.row_threads - 1); }

    __device__ int spans() const {
        int const columns = params.row_threads * kChunks * kColumns;
        return (params.columns + columns - 1) / columns;
    }

    __device__ int column(int span, int chunk) const {
        return ((span * kChunks + chunk) * params.row_threads + lane()) * kColumns;
    }

    // y of the span before a norm: x, x + residual, or silu(x) * up. `writes`: the sum is stored.
    __device__ __forceinline__ void load(int span, bool writes) {
        if (params.vector_access) {
            load_as<true>(span, writes);
        } else {
            load_as<false>(span, writes);
        }
    }

    __device__ __forceinline__ void normalise(int span) {
        if (Config::kInput == Input::kFp32 || params.norm_is_fp32) {
            normalise_by<Input::kFp32>(span);
        } else {
            normalise_by<Config::kInput>(span);
        }
    }

    // One 16-byte store a chunk.
    __device__ __forceinline__ void store(int span, int chunk, float inverse) const {
        int const first = column(span, chunk);
        if (first >= end) {
            return;
        }
        float const(&x)[kColumns] = y[chunk];
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = pack<false>(multiply(x[4 * i], inverse), multiply(x[4 * i + 1], inverse),
                                   multiply(x[4 * i + 2], inverse), multiply(x[4 * i + 3], inverse));
        }
        char* const target = static_cast<char*>(params.out) + index * params.out_stride + first;
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // What is finite counts.
    __device__ __forceinline__ uint32_t amax(int chunk) const {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            largest = max(largest, finite_magnitude(y[chunk][i]));
        }
        return largest;
    }

  private:
    template <bool kVectors>
    __device__ __forceinline__ void load_as(int span, bool writes) {
        using X = Chunk<Config::kInput>;
        void const* const x = row_of<X>(params.x, params.x_stride);
        void const* const other = row_of<X>(params.other, params.other_stride);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            int const first = column(span, c);
            int const inside = end - first;
            X chunk;
            chunk.load(kVectors, x, first, inside);
            chunk.widen_into(y[c]);
            if constexpr (Config::kPrologue != Prologue::kNone) {
                X second;
                second.load(kVectors, other, first, params.other != nullptr ? inside : 0, kNothing);
                float values[kColumns];
                second.widen_into(values);
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    y[c][i] = Config::kSilu ? multiply(silu(y[c][i]), values[i]) : add(y[c][i], values[i]);
                }
            }
            if constexpr (Config::kNorm) {
                chunk.narrow_from(y[c]);
                chunk.widen_into(y[c]);
                void* const sum = const_cast<void*>(row_of<X>(params.sum, params.sum_stride));
                chunk.store(kVectors, sum, first, writes && params.sum != nullptr ? inside : 0);
            }
        }
    }

    template <Input kWeight>
    __device__ __forceinline__ void normalise_by(int span) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            int const first = column(span, c);
            Chunk<kWeight> chunk;
            chunk.load(params.vector_access, params.norm_weight, first, end - first);
            float weight[kColumns];
            chunk.widen_into(weight);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                y[c][i] = multiply(multiply(y[c][i], inverse_rms), weight[i]);
            }
            // Columns that fill up the last chunk are zeros, where a row is NaN as well.
            if (first + kColumns > end) {
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    y[c][i] = first + i < end ? y[c][i] : 0.0f;
                }
            }
        }
    }

    template <class X>
    __device__ __forceinline__ void const* row_of(void const* base, int64_t stride) const {
        return static_cast<char const*>(base) + index * stride * X::kBytes;
    }
};

// The sum of squares of a thread's columns: every sixteenth column in turn, then by pairs of neighbours.
struct SquareSum {
    float sums[MatrixConfig::kColumns] = {};

    __device__ __forceinline__ void add_span(MatrixRow const& row) {
#pragma unroll
        for (int c = 0; c < MatrixConfig::kChunks; ++c) {
#pragma unroll
            for (int i = 0; i < MatrixConfig::kColumns; ++i) {
                sums[i] = add(sums[i], multiply(row.y[c][i], row.y[c][i]));
            }
        }
    }

    __device__ __forceinline__ float total() {
#pragma unroll
        for (int step = 1; step < MatrixConfig::kColumns; step *= 2) {
#pragma unroll
            for (int i = 0; i < MatrixConfig::kColumns; ++i) {
                if (i % (2 * step) == 0) {
                    sums[i] = add(sums[i], sums[i + step]);
                }
            }
        }
        return sums[0];
    }
};

}  // namespace flash8::quantize
