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
    template <class Accumulator>
    __device__ static void store(ForwardParams const& params, SeqlenInfo const& info, WorkTile const& tile,
                                 int first_row, Accumulator& o, OnlineSoftmax& softmax) {
        float normalise[kRowsPerThread];
        float lse[kRowsPerThread];
        QueryRow rows[kRowsPerThread];
        float sinks[kRowsPerThread];
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            rows[r] = query_row<Config::kPackGqa>(params, tile, first_row + 8 * r);
            bool const sink = params.scores.sinks != nullptr && rows[r].query < info.capacity_q;
            sinks[r] = sink ? params.scores.sinks[rows[r].head] : -INFINITY;
        }
        softmax.finish(sinks, normalise, lse);
        Element* const out = static_cast<Element*>(params.o.ptr) + info.batch_q * params.o.batch_stride;
        float* const out_lse = params.lse.ptr + info.batch_q * params.lse.batch_stride;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            bool const used = rows[r].query < info.seqlen_q;
            bool const inside = rows[r].query < info.capacity_q;
            int64_t const target = info.offset_q + static_cast<int64_t>(rows[r].query);
            store_row(out + target * params.o.row_stride + rows[r].head * params.o.head_stride, inside, o, r,
                      used ? normalise[r] : 0.0f, params.head_dim_v);
            if (inside && threadIdx.x % 4 == 0 && params.lse.ptr != nullptr) {
                out_lse[rows[r].head * params.lse.head_stride + target] = used ? lse[r] : -INFINITY;
            }
        }
    }

  private:
    // A quad holds a row: lane q has columns 8 i + 2 q and 8 i + 2 q + 1. Four neighbouring column groups are
    // transposed within the quad, so that lane q stores all eight columns of group 4 g + q: 16 bytes.
    template <class Accumulator>
    __device__ static void store_row(Element* row, bool inside, Accumulator const& o, int r, float factor,
                                     int head_dim_v) {
        int const lane = threadIdx.x % 4;
#pragma unroll
        for (int group = 0; group < Config::kHeadDimV / 32; ++group) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                auto const value = [&](int column) {
                    // A factor of 0 gives 0 whatever was accumulated.
                    float const x = o(cute::make_coord(cute::make_coord(column, r, 4 * group + i), 0, 0));
                    return factor == 0.0f ? 0.0f : x * factor;
                };
                words[i] = pack<Element>(value(0), value(1));
            }
            transpose_quad(words, lane);
            int const column = 8 * (4 * group + lane);
            if (inside && column < head_dim_v) {
                *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
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
