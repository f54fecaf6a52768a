// From accumulators to O and LSE in global memory, without shared memory.

#pragma once

#include "../convert.cuh"
#include "../softmax.cuh"
#include "../tile_scheduler.cuh"
#include "config.cuh"
#include "query_row.cuh"

namespace flash8 {

template <class Config>
struct Epilogue {
    using Element = typename Config::Element;

    // Every row of the sequence in this tile is written: zero where it is not used or has seen no key.
    // v_scale: what turns O into real values beside the normalisation.
    template <class Accumulator, class Softmax>
    __device__ static void store(ForwardParams const& params, SeqlenInfo const& info, WorkTile const& tile,
                                 int first_row, Accumulator& o, Softmax const& softmax, float v_scale) {
        QueryRow rows[kRowsPerThread];
        float shift[kRowsPerThread] = {0.0f, 0.0f};
        float sinks[kRowsPerThread];
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            rows[r] = query_row<Config::kPackGqa>(params, tile, first_row + 8 * r);
            if constexpr (Config::kFp8) {
                shift[r] = score_shift(params.score_shift, info, rows[r]);
            }
            bool const sink = params.scores.sinks != nullptr && rows[r].query < info.capacity_q;
            sinks[r] = sink ? params.scores.sinks[rows[r].head] - shift[r] : -INFINITY;
        }
        RowStatistics const statistics = softmax.finish(sinks);
        uint16_t* const out = static_cast<uint16_t*>(params.o.ptr) + info.batch_q * params.o.batch_stride;
        float* const out_lse = params.lse.ptr + info.batch_q * params.lse.batch_stride;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            bool const used = rows[r].query < info.seqlen_q;
            bool const inside = rows[r].query < info.capacity_q;
            int64_t const target = info.offset_q + static_cast<int64_t>(rows[r].query);
            uint16_t* const out_row =
                out + target * params.o.row_stride + rows[r].head * params.o.head_stride;
            float const factor = used ? statistics.normalise[r] * v_scale : 0.0f;
            if constexpr (Config::kFp8) {
                float const weight = used ? statistics.weight[r] : 0.0f;
                store_interleaved_row(params, tile, out_row, inside, o, r, factor, weight);
            } else {
                store_row(out_row, inside, o, r, factor, params.head_dim_v);
            }
            if (inside && threadIdx.x % 4 == 0 && params.lse.ptr != nullptr) {
                out_lse[rows[r].head * params.lse.head_stride + target] =
                    used ? statistics.lse[r] + shift[r] : -INFINITY;
            }
        }
    }

  private:
    // What the scores of a row lack since K lacks its mean; 0 for rows that are not used.
    __device__ static float score_shift(RowRef const& ref, SeqlenInfo const& info, QueryRow const& row) {
        if (ref.ptr == nullptr || row.query >= info.seqlen_q) {
            return 0.0f;
        }
        return ref
            .ptr[info.batch_q * ref.batch_stride + row.head * ref.head_stride + info.offset_q + row.query];
    }

    // A factor of 0 gives 0 whatever was accumulated.
    __device__ __forceinline__ static float scaled(float x, float factor) {
        return factor == 0.0f ? 0.0f : x * factor;
    }

    // A quad holds a row: lane q has columns 8 i + 2 q and 8 i + 2 q + 1. Four neighbouring column groups are
    // transposed within the quad, so that lane q stores all eight columns of group 4 g + q: 16 bytes.
    template <class Accumulator>
    __device__ static void store_row(uint16_t* row, bool inside, Accumulator const& o, int r, float factor,
                                     int head_dim_v) {
        int const lane = threadIdx.x % 4;
#pragma unroll
        for (int group = 0; group < Config::kHeadDimV / 32; ++group) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const first = 4 * (4 * group + i) + 2 * r;
                words[i] = pack<Element>(scaled(o(first), factor), scaled(o(first + 1), factor));
            }
            transpose_quad(words, lane);
            int const column = 8 * (4 * group + lane);
            if (inside && column < head_dim_v) {
                *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

    // FP8: by transpose.cuh's order of channels, the column groups 2 i and 2 i + 1 of lane q are the channels
    // 16 i + 4 q + {0, 2} and 16 i + 4 q + {1, 3}: 8 bytes. V's mean comes back with the weight of the keys.
    template <class Accumulator>
    __device__ static void store_interleaved_row(ForwardParams const& params, WorkTile const& tile,
                                                 uint16_t* row, bool inside, Accumulator const& o, int r,
                                                 float factor, float weight) {
        bool const half = params.o_type == ElementType::kFloat16;
        float const* const mean = v_mean(params, tile);
#pragma unroll
        for (int i = 0; i < Config::kHeadDimV / 16; ++i) {
            int const column = 16 * i + 4 * static_cast<int>(threadIdx.x % 4);
            if (!inside || column >= params.head_dim_v) {
                continue;
            }
            float values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                values[j] = scaled(o(4 * (2 * i + j % 2) + 2 * r + j / 2), factor);
                values[j] += mean != nullptr ? weight * mean[column + j] : 0.0f;
            }
            uint2 const words = half ? make_uint2(pack<cutlass::half_t>(values[0], values[1]),
                                                  pack<cutlass::half_t>(values[2], values[3]))
                                     : make_uint2(pack<cutlass::bfloat16_t>(values[0], values[1]),
                                                  pack<cutlass::bfloat16_t>(values[2], values[3]));
            *reinterpret_cast<uint2*>(row + column) = words;
        }
    }

    __device__ static float const* v_mean(ForwardParams const& params, WorkTile const& tile) {
        ChannelRef const& ref = params.v_mean;
        if (ref.ptr == nullptr) {
            return nullptr;
        }
        return ref.ptr + tile.batch * ref.batch_stride +
               kv_head<Config::kPackGqa>(params, tile) * ref.head_stride;
    }

    // words[i] of lane j becomes words[j] of lane i: a butterfly over the two bits of the lane.
    __device__ static void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
            bool const upper = (lane & bit) != 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if ((i & bit) == 0) {
                    uint32_t const sent = upper ? words[i] : words[i + bit];
                    uint32_t const received = __shfl_xor_sync(0xffffffff, sent, bit);
                    words[i] = upper ? received : words[i];
                    words[i + bit] = upper ? words[i + bit] : received;
                }
            }
        }
    }
};

}  // namespace flash8
