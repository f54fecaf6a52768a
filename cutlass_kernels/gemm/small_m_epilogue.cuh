// From sums to out in global memory, by elements: out has few rows, M / K of what was read of B.
//
// A thread holds two columns of out, 8 apart, and of each group of eight rows two. Eight lanes store
// neighbouring columns of a row.

#pragma once

#include "arch/convert.cuh"
#include "arch/wgmma.cuh"
#include "small_m_tile_walk.cuh"

namespace flash8::small_m {

class Epilogue {
    static constexpr int kColumns = 2;                 // of out, of a thread
    static constexpr int kRows = Config::kBlockM / 4;  // likewise

  public:
    // 64 columns of a tile whose first row is m0, from n0 on. Of its rows those of `rows` are stored.
    __device__ static void store(GemmParams const& params, int m0, int n0, Rows const& rows,
                                 Config::Accumulator& sum) {
        auto sums = rows_of(sum);
        int const column = n0 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        int const row = m0 + 2 * static_cast<int>(threadIdx.x % 4);
        finish(params, row, column, sums);
        if (params.out_type == ElementType::kFloat32) {
            write(params, static_cast<float*>(params.out), row, rows, column, sums,
                  [](float x) { return x; });
        } else if (params.out_type == ElementType::kUint8) {
            float const result = params.scale_result != nullptr ? *params.scale_result : 1.0f;
            write(params, static_cast<uint8_t*>(params.out), row, rows, column, sums, [result](float x) {
                return static_cast<uint8_t>(pack_e4m3(__fmul_rn(x, result), 0.0f, 0.0f, 0.0f));
            });
        } else if (params.out_type == ElementType::kFloat16) {
            write(params, static_cast<uint16_t*>(params.out), row, rows, column, sums,
                  [](float x) { return static_cast<uint16_t>(pack<cutlass::half_t>(x, 0.0f)); });
        } else {
            write(params, static_cast<uint16_t*>(params.out), row, rows, column, sums,
                  [](float x) { return static_cast<uint16_t>(pack<cutlass::bfloat16_t>(x, 0.0f)); });
        }
    }

  private:
    __device__ __forceinline__ static int row_of(int row, int i) { return row + 8 * (i / 2) + i % 2; }

    // Scales of tensors and rows, and the bias. Three roundings, as the portable code has them.
    template <class Sums>
    __device__ __forceinline__ static void finish(GemmParams const& params, int row, int column, Sums& sums) {
#pragma unroll
        for (int r = 0; r < kColumns; ++r) {
            int64_t const n = min(column + 8 * r, params.n - 1);
            if constexpr (!Config::kBlockScales) {
                float const of_column = params.scale_b.ptr[n * params.scale_b.row_stride];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    int64_t const m = min(row_of(row, i), params.m - 1);
                    float const of_row = params.scale_a.ptr[m * params.scale_a.row_stride];
                    sums(r, i) = __fmul_rn(sums(r, i), __fmul_rn(of_row, of_column));
                }
            }
            if (params.bias != nullptr) {
                float const bias = bias_of(params, n);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    sums(r, i) = __fadd_rn(sums(r, i), bias);
                }
            }
        }
    }

    __device__ __forceinline__ static float bias_of(GemmParams const& params, int64_t column) {
        if (params.bias_type == ElementType::kFloat32) {
            return static_cast<float const*>(params.bias)[column];
        }
        if (params.bias_type == ElementType::kFloat16) {
            return static_cast<float>(static_cast<cutlass::half_t const*>(params.bias)[column]);
        }
        return static_cast<float>(static_cast<cutlass::bfloat16_t const*>(params.bias)[column]);
    }

    template <class Element, class Sums, class Round>
    __device__ __forceinline__ static void write(GemmParams const& params, Element* out, int row,
                                                 Rows const& rows, int column, Sums const& sums,
                                                 Round const& round) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            int const m = row_of(row, i);
            Element* const at = out + m * params.out_stride + column;
#pragma unroll
            for (int r = 0; r < kColumns; ++r) {
                if (m >= rows.begin && m < rows.end && column + 8 * r < params.n) {
                    at[8 * r] = round(sums(r, i));
                }
            }
        }
    }
};

}  // namespace flash8::small_m
