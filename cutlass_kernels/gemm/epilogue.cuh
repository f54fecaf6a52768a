// From sums to out in global memory, without shared memory.
//
// A quad holds a row: lane q has columns 8 i + 2 q and 8 i + 2 q + 1 of its column groups i. Four
// neighbouring groups, 32 columns, are finished at a time, so that few scales and biases are in registers. Of
// 16 bits: they are transposed within the quad, so that lane q stores all eight columns of group q, 16 bytes.
// Of e4m3: the same, 8 bytes.
// Of fp32: a quad stores eight columns at a time, 32 bytes.

#pragma once

#include "arch/convert.cuh"
#include "arch/quad.cuh"
#include "arch/wgmma.cuh"
#include "bias.cuh"
#include "tile.cuh"

namespace flash8::gemm {

class Epilogue {
    static constexpr int kRows = 2;     // of a thread, 8 apart
    static constexpr int kGroups = 4;   // finished at a time
    static constexpr int kColumns = 8;  // of a thread in these groups
    static_assert(Config::kBlockN % (8 * kGroups) == 0);

  public:
    // 64 rows of the tile; first_row is this thread's first row of out.
    __device__ static void store(GemmParams const& params, Tile const& tile, int first_row,
                                 Config::Accumulator& sum) {
        auto const sums = rows_of(sum);
        float const* const scale_b = params.scale_b.ptr + tile.group * params.scale_b_group_stride;
        float const result = params.scale_result != nullptr ? *params.scale_result : 1.0f;
        Row rows[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            rows[r] = row_of(params, tile, first_row + 8 * r);
        }
#pragma unroll
        for (int first = 0; first < Config::kBlockN; first += 8 * kGroups) {
            float values[kRows][kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                int const column = min(tile.n0 + first + column_of(i), params.n - 1);
                float const scale = Config::kBlockScales ? 1.0f : scale_b[column * params.scale_b.row_stride];
                float const bias = params.bias != nullptr ? bias_of(params, column) : 0.0f;
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    // Three roundings, as the portable code has them.
                    float const x = sums(r, first / 4 + i);
                    float const scaled =
                        Config::kBlockScales ? x : __fmul_rn(x, __fmul_rn(rows[r].scale, scale));
                    values[r][i] = params.bias != nullptr ? __fadd_rn(scaled, bias) : scaled;
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (params.out_type == ElementType::kFloat32) {
                    write(params, static_cast<float*>(params.out), rows[r], first, values[r]);
                } else if (params.out_type == ElementType::kUint8) {
                    scale(values[r], result);
                    write(params, static_cast<uint8_t*>(params.out), rows[r], first, values[r]);
                } else {
                    write(params, static_cast<uint16_t*>(params.out), rows[r], first, values[r]);
                }
            }
        }
    }

  private:
    struct Row {
        int64_t offset;  // of the tile's first column in out
        int columns;     // that there are from there on; none of rows beyond out, or beyond the tile's group
        float scale;
    };

    __device__ __forceinline__ static Row row_of(GemmParams const& params, Tile const& tile, int row) {
        float const scale =
            Config::kBlockScales ? 1.0f : scale_of_row(params, tile, min(row, tile.m_end - 1));
        int64_t const out_row = Config::kGroupedK ? int64_t{tile.group} * params.m + row : row;
        return {out_row * params.out_stride + tile.n0, row < tile.m_end ? params.n - tile.n0 : 0, scale};
    }

    __device__ __forceinline__ static float scale_of_row(GemmParams const& params, Tile const& tile,
                                                         int row) {
        return params.scale_a.ptr[row * params.scale_a.row_stride + tile.group * params.scale_a_group_stride];
    }

    // Where value i of this thread lies in its groups.
    __device__ __forceinline__ static int column_of(int i) {
        return 8 * (i / 2) + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
    }

    __device__ __forceinline__ static void scale(float (&values)[kColumns], float by) {
#pragma unroll
        for (float& value : values) {
            value = __fmul_rn(value, by);
        }
    }

    // The groups that begin `first` columns into the tile.
    __device__ __forceinline__ static void write(GemmParams const& params, uint16_t* out, Row const& row,
                                                 int first, float const (&values)[kColumns]) {
        bool const half = params.out_type == ElementType::kFloat16;
        uint32_t words[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float const low = values[2 * i], high = values[2 * i + 1];
            words[i] = half ? pack<cutlass::half_t>(low, high) : pack<cutlass::bfloat16_t>(low, high);
        }
        if (params.vector_stores) {
            int const lane = threadIdx.x % 4;
            transpose_quad(words, lane);
            int const column = first + 8 * lane;
            if (column < row.columns) {
                *reinterpret_cast<uint4*>(out + row.offset + column) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                int const column = first + column_of(i);
                if (column < row.columns) {
                    out[row.offset + column] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
                }
            }
        }
    }

    // Two values of e4m3 in the low half of a word. Saturated: infinity is 448.
    __device__ __forceinline__ static void write(GemmParams const& params, uint8_t* out, Row const& row,
                                                 int first, float const (&values)[kColumns]) {
        uint32_t words[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            words[i] = pack_e4m3(values[2 * i], values[2 * i + 1], 0.0f, 0.0f);
        }
        if (params.vector_stores) {
            int const lane = threadIdx.x % 4;
            transpose_quad(words, lane);
            int const column = first + 8 * lane;
            if (column < row.columns) {
                *reinterpret_cast<uint2*>(out + row.offset + column) =
                    make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                int const column = first + column_of(i);
                if (column < row.columns) {
                    out[row.offset + column] = static_cast<uint8_t>(words[i / 2] >> (8 * (i % 2)));
                }
            }
        }
    }

    __device__ __forceinline__ static void write(GemmParams const& params, float* out, Row const& row,
                                                 int first, float const (&values)[kColumns]) {
#pragma unroll
        for (int i = 0; i < kColumns; i += 2) {
            int const column = first + column_of(i);
            float* const at = out + row.offset + column;
            if (params.vector_stores) {
                if (column < row.columns) {
                    *reinterpret_cast<float2*>(at) = make_float2(values[i], values[i + 1]);
                }
            } else {
                if (column < row.columns) {
                    at[0] = values[i];
                }
                if (column + 1 < row.columns) {
                    at[1] = values[i + 1];
                }
            }
        }
    }
};

}  // namespace flash8::gemm
