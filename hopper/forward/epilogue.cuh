// From accumulators to O and LSE in global memory, without shared memory.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/quad.cuh"
#include "../attention/pack_gqa.cuh"
#include "../attention/softmax.cuh"
#include "../attention/tile_scheduler.cuh"
#include "../clamp.cuh"
#include "config.cuh"
#include "e4m3_row.cuh"

namespace flash8 {

// What FP8 and dropout leave for the epilogue to apply.
struct EpilogueScales {
    float v_scale = 1.0f;  // V's descale, as far as the mainloop has not applied it, times dropout's scale
    float score_shift[kRowsPerThread] = {0.0f, 0.0f};  // to be added to the scores of a row, natural log
};

template <class Config>
class Epilogue {
    using Element = typename Config::Element;
    using Stored = typename Config::Stored;

  public:
    // Writes every row of the sequence in this tile: zero if the row is unused or has seen no key.
    template <class Accumulator, class Softmax>
    __device__ static void store(ForwardParams const& params, SeqlenInfo const& info, WorkTile const& tile,
                                 int first_row, Accumulator& o, Softmax const& softmax,
                                 EpilogueScales const& scales) {
        QueryRow rows[kRowsPerThread];
        float sinks[kRowsPerThread];
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            rows[r] = query_row<Config::kPackGqa>(params, tile, first_row + 8 * r);
            bool const sink = params.scores.sinks != nullptr && rows[r].query < info.rows_q;
            sinks[r] = sink ? params.scores.sinks[rows[r].head] - scales.score_shift[r] : -INFINITY;
        }
        RowStatistics const statistics = softmax.finish(sinks);
        Stored* const out = static_cast<Stored*>(params.o.ptr) + info.batch_q * params.o.batch_stride;
        float* const out_lse = params.lse.ptr + info.batch_q * params.lse.batch_stride;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            bool const used = rows[r].query < info.seqlen_q;
            bool const inside = rows[r].query < info.rows_q;
            int64_t const target = info.offset_q + static_cast<int64_t>(rows[r].query);
            Stored* const out_row = out + target * params.o.row_stride + rows[r].head * params.o.head_stride;
            RowFactors const factors{used ? statistics.normalise[r] * scales.v_scale : 0.0f,
                                     used ? statistics.weight[r] : 0.0f};
            if constexpr (Config::kOutE4m3) {
                finish_row(o, r, factors, Channels(params, tile));
                E4m3Row<Config>::store(params.out_scale, o, r, inside, out_row,
                                       scales_of(params, info.batch_q, target, rows[r].head));
            } else if constexpr (Config::kFp8) {
                store_interleaved_row(out_row, inside, o, r, factors, Channels(params, tile));
            } else {
                store_row(out_row, inside, o, r, factors.normalise, params.head_dim_v);
            }
            if (inside && threadIdx.x % 4 == 0 && params.lse.ptr != nullptr) {
                out_lse[rows[r].head * params.lse.head_stride + target] =
                    used ? statistics.lse[r] + scales.score_shift[r] : -INFINITY;
            }
        }
    }

  private:
    struct RowFactors {
        float normalise;
        float weight;  // of the keys, as opposed to the sink
    };

    // A factor of 0 gives 0, even if the accumulator holds NaN.
    __device__ __forceinline__ static float scaled(float x, float factor) {
        return factor == 0.0f ? 0.0f : x * factor;
    }

    // Where the scales of a row of a head are.
    __device__ __forceinline__ static float* scales_of(ForwardParams const& params, int batch, int64_t row,
                                                       int head) {
        int64_t const query = int64_t{batch} * params.sequences.max_seqlen_q + row;
        return params.out_scale.ptr + query * params.out_scale.row_stride + head * E4m3Row<Config>::kScales;
    }

    // FP8: applies a channel's descale and mean, if the call has them, and rounds to O's type.
    class Channels {
      public:
        __device__ Channels(ForwardParams const& params, WorkTile const& tile)
            : count_(params.head_dim_v),
              half_(params.o_type == ElementType::kFloat16),
              descale_(of_head(params.v_channel_descale, params, tile)),
              mean_(of_head(params.v_mean, params, tile)) {}

        __device__ __forceinline__ int count() const { return count_; }

        __device__ __forceinline__ float restore(float x, int channel, RowFactors const& factors) const {
            float value = scaled(x, factors.normalise);
            // A row that has seen no key is zero, even if the descale is invalid.
            bool const scales = descale_ != nullptr && factors.normalise != 0.0f;
            value *= scales ? checked_descale(descale_[channel]) : 1.0f;
            value += mean_ != nullptr ? factors.weight * mean_[channel] : 0.0f;
            return value;
        }

        __device__ __forceinline__ uint32_t round(float low, float high) const {
            return half_ ? pack<cutlass::half_t>(low, high) : pack<cutlass::bfloat16_t>(low, high);
        }

      private:
        __device__ static float const* of_head(ChannelRef const& ref, ForwardParams const& params,
                                               WorkTile const& tile) {
            if (ref.ptr == nullptr) {
                return nullptr;
            }
            return ref.ptr + tile.batch * ref.batch_stride +
                   kv_head<Config::kPackGqa>(params, tile) * ref.head_stride;
        }

        int count_;
        bool half_;
        float const* descale_;
        float const* mean_;
    };

    // O in fp32, in the place of the accumulators.
    template <class Accumulator>
    __device__ __forceinline__ static void finish_row(Accumulator& o, int r, RowFactors const& factors,
                                                      Channels const& channels) {
        using Row = E4m3Row<Config>;
#pragma unroll
        for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
            for (int j = 0; j < Row::kValues; ++j) {
                float& x = o(Row::index(i, r, j));
                if constexpr (Config::kFp8) {
                    x = channels.restore(x, Row::first_channel(i) + j, factors);
                } else {
                    x = scaled(x, factors.normalise);
                }
            }
        }
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

    // FP8: by transpose_v.cuh's order of channels, the column groups 2 i and 2 i + 1 of lane q are the
    // channels 16 i + 4 q + {0, 2} and 16 i + 4 q + {1, 3}: 8 bytes.
    template <class Accumulator>
    __device__ static void store_interleaved_row(uint16_t* row, bool inside, Accumulator const& o, int r,
                                                 RowFactors const& factors, Channels const& channels) {
#pragma unroll
        for (int i = 0; i < Config::kHeadDimV / 16; ++i) {
            int const column = 16 * i + 4 * static_cast<int>(threadIdx.x % 4);
            if (!inside || column >= channels.count()) {
                continue;
            }
            float values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                values[j] = channels.restore(o(4 * (2 * i + j % 2) + 2 * r + j / 2), column + j, factors);
            }
            *reinterpret_cast<uint2*>(row + column) =
                make_uint2(channels.round(values[0], values[1]), channels.round(values[2], values[3]));
        }
    }
};

}  // namespace flash8
