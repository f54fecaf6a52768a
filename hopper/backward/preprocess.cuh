// The work of preprocess.cu.

#pragma once

#include "../attention/seqlen_info.cuh"
#include "../attention/softmax.cuh"
#include "../attention/tile_scheduler.cuh"
#include "key_mean.cuh"
#include "packed_offsets.cuh"
#include "preprocess_fp8.cuh"
#include "row_stats.cuh"
#include "variant.cuh"

namespace flash8 {

struct PreprocessConfig : BackwardVariant {
    static constexpr int kThreads = 256;
    static constexpr int kLanes = 8;  // of a row, eight channels at a time each
};

template <class Config>
class Preprocess {
    static constexpr int kBlockM = Config::Tiles::kBlockM;
    using Stats = BlockStats<kBlockM, Config::kFp8>;
    struct Nothing {
        __device__ Nothing(BackwardParams const&, WorkTile const&, SeqlenInfo const&, int64_t) {}
    };
    using Queries = std::conditional_t<Config::kFp8, Fp8Queries<Config>, Nothing>;

  public:
    __device__ Preprocess(BackwardParams const& params, WorkTile const& tile)
        : params_(params),
          tile_(tile),
          info_(SeqlenInfo::read(params.sequences, tile.batch, tile.offset_q)),
          mean_(params, tile.batch, tile.head / (params.heads_q / params.heads_kv)) {
        int64_t const in_head = first_query_block<kBlockM>(params, tile.batch, tile.offset_q) + tile.m_block;
        block_ = tile.head * params.query_blocks + in_head;
    }

    // FP8 only.
    __device__ void store_key_mean(typename KeySample<Config>::Sums& sums) const {
        KeySample<Config>::store_mean(params_, tile_, info_, sums);
    }

    // sums: one float per warp.
    __device__ void run(float* sums) const {
        auto& stats = reinterpret_cast<Stats*>(params_.row_stats)[block_];
        Queries const queries(params_, tile_, info_, block_);
        float sink_sum = 0.0f;
        constexpr int kRowsAtOnce = Config::kThreads / Config::kLanes;
        int const lane = threadIdx.x % Config::kLanes;
#pragma unroll 1
        for (int row = threadIdx.x / Config::kLanes; row < kBlockM; row += kRowsAtOnce) {
            int const query = tile_.m_block * kBlockM + row;
            bool const used = query < info_.seqlen_q;
            float const product = sum_of_lanes(used ? o_dot_dout(query, lane) : 0.0f);
            float shift = 0.0f;
            float v_share = 0.0f;  // of dO * O, by V's mean
            if constexpr (Config::kFp8) {
                shift = sum_of_lanes(queries.widen_q(row, query, used, lane));
                v_share =
                    sum_of_lanes(used ? queries.dout_dot_mean(row_of(params_.dout, query), lane) : 0.0f);
            } else {
                shift = sum_of_lanes(used && mean_.given() ? q_dot_mean(query, lane) : 0.0f);
            }
            if (lane == 0) {
                sink_sum += finish_row(stats, row, query, used, product, shift, v_share);
            }
        }
        if constexpr (Config::kFp8) {
            if (threadIdx.x < 4) {
                stats.rows.q_descale[threadIdx.x] = queries.descale();
            }
        }
        zero_dq();
        if (params_.dsinks_partial != nullptr) {
            store_sink_sum(sums, sink_sum);
        }
    }

  private:
    // This lane's part.
    __device__ float o_dot_dout(int query, int lane) const {
        uint16_t const* const o = row_of(params_.o, query);
        uint16_t const* const dout = row_of(params_.dout, query);
        float sum = 0.0f;
#pragma unroll 1
        for (int column = 8 * lane; column < params_.head_dim_v; column += 8 * Config::kLanes) {
            uint4 const a = *reinterpret_cast<uint4 const*>(o + column);
            uint4 const b = *reinterpret_cast<uint4 const*>(dout + column);
            sum += dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
        }
        return sum;
    }

    // The same of q . c, which the scores of K - c lack.
    __device__ float q_dot_mean(int query, int lane) const {
        uint16_t const* const q = row_of(params_.q, query);
        float sum = 0.0f;
#pragma unroll 1
        for (int column = 8 * lane; column < params_.head_dim; column += 8 * Config::kLanes) {
            uint4 const words = *reinterpret_cast<uint4 const*>(q + column);
            uint32_t const pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 const x = unpack<typename Config::Element>(pairs[i]);
                float2 const m = mean_.at(column + 2 * i);
                sum += x.x * m.x + x.y * m.y;
            }
        }
        return sum;
    }

    // Over the lanes of a row.
    __device__ static float sum_of_lanes(float x) {
#pragma unroll
        for (int distance = 1; distance < Config::kLanes; distance *= 2) {
            x += __shfl_xor_sync(0xffffffff, x, distance);
        }
        return x;
    }

    // Returns what the row adds to the sink's gradient. A row that has seen neither key nor sink has P = 0
    // and no gradient; one that is not used has LSE = -inf.
    __device__ float finish_row(Stats& stats, int row, int query, bool used, float product, float shift,
                                float v_share) const {
        float const lse = used ? row_value(params_.lse, info_, tile_.head, query) : -INFINITY;
        bool const empty = lse == -INFINITY;
        float const dlse =
            params_.dlse.ptr != nullptr && !empty ? row_value(params_.dlse, info_, tile_.head, query) : 0.0f;
        float const d = empty ? 0.0f : product - dlse;
        stats.rows.lse[row] = empty ? INFINITY : (lse - params_.scores.softmax_scale * shift) * kLog2E;
        bool const sink = params_.scores.sinks != nullptr && !empty;
        float const sink_share =
            sink ? -ptx::exp2((params_.scores.sinks[tile_.head] - lse) * kLog2E) * d : 0.0f;
        if constexpr (Config::kFp8) {
            stats.rows.d[row] = empty ? 0.0f : d - v_share;
            stats.ds_sum[row] = dlse - sink_share;
        } else {
            stats.rows.d[row] = d;
        }
        return sink_share;
    }

    __device__ void zero_dq() const {
        constexpr int kVectors = Config::Tiles::kDqFloats / 4;
        float4* const target = reinterpret_cast<float4*>(params_.dq_accum) + block_ * kVectors;
#pragma unroll
        for (int i = 0; i < kVectors; i += Config::kThreads) {
            target[i + threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        if (params_.dq_semaphore != nullptr && threadIdx.x == 0) {
            params_.dq_semaphore[block_] = 0;
        }
    }

    // In an order that never changes.
    __device__ void store_sink_sum(float* sums, float mine) const {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            mine += __shfl_xor_sync(0xffffffff, mine, distance);
        }
        if (threadIdx.x % 32 == 0) {
            sums[threadIdx.x / 32] = mine;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int i = 0; i < Config::kThreads / 32; ++i) {
                sum += sums[i];
            }
            params_.dsinks_partial[block_] = sum;
        }
    }

    __device__ uint16_t const* row_of(TensorRef const& tensor, int query) const {
        return static_cast<uint16_t const*>(tensor.ptr) + info_.batch_q * tensor.batch_stride +
               (info_.offset_q + static_cast<int64_t>(query)) * tensor.row_stride +
               tile_.head * tensor.head_stride;
    }

    // Of two pairs.
    __device__ static float dot(uint32_t a, uint32_t b) {
        float2 const x = unpack<typename Config::Element>(a);
        float2 const y = unpack<typename Config::Element>(b);
        return x.x * y.x + x.y * y.y;
    }

    BackwardParams const& params_;
    WorkTile tile_;
    SeqlenInfo info_;
    KeyMean<typename Config::Element> mean_;
    int64_t block_;
};

// Zeros in the rows before the first sequence and past the last one of a packed tensor, by all warps of the
// grid.
template <class Config>
__device__ inline void zero_unused_rows(TensorRef const& tensor, int32_t const* cu_seqlens, int batch,
                                        int64_t total, int heads, int head_dim) {
    if (cu_seqlens == nullptr) {
        return;
    }
    int const rows = static_cast<int>(total);
    int const before = clamped(cu_seqlens[0], 0, rows);
    if (before == 0 && clamped(cu_seqlens[batch], 0, rows) == rows) {
        return;
    }
    int const end = largest_offset(cu_seqlens, batch, total);
    constexpr int kWarps = Config::kThreads / 32;
    int64_t const count = static_cast<int64_t>(before + (rows - end)) * heads;
    int64_t const warps = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < count; i += warps) {
        int const unused = static_cast<int>(i / heads);
        int64_t const row = unused < before ? unused : unused - before + end;
        uint16_t* const target =
            static_cast<uint16_t*>(tensor.ptr) + row * tensor.row_stride + i % heads * tensor.head_stride;
        for (int column = threadIdx.x % 32 * 8; column < head_dim; column += 32 * 8) {
            *reinterpret_cast<uint4*>(target + column) = make_uint4(0, 0, 0, 0);
        }
    }
}

template <class Config>
__device__ inline void zero_unused_rows(BackwardParams const& params) {
    SequenceParams const& s = params.sequences;
    zero_unused_rows<Config>(params.dq, s.cu_seqlens_q, s.batch, s.total_q, params.heads_q, params.head_dim);
    zero_unused_rows<Config>(params.dk, s.cu_seqlens_k, s.batch, s.total_k, params.heads_kv, params.head_dim);
    zero_unused_rows<Config>(params.dv, s.cu_seqlens_k, s.batch, s.total_k, params.heads_kv,
                             params.head_dim_v);
}

}  // namespace flash8
