// After the kernel: dQ of a block of queries, from fp32 sums in the order of the accumulators to 16-bit rows.
// One CTA per block of a query head; memory bound. The first CTAs also add up the gradients of the sinks.
// With split query heads the last CTAs have a block of keys each, and make dK and dV of the splits' sums.

#include "../attention/seqlen_info.cuh"
#include "head_splits.cuh"
#include "key_mean.cuh"
#include "query_tile.cuh"
#include "row_stats.cuh"
#include "store_rows.cuh"
#include "variant.cuh"

namespace flash8 {

struct Config : BackwardVariant {
    static constexpr int kThreads = 128 * Tiles::kWarpgroups;
};

// rowsum(dS), which dQ = dS (K - c) lacks times c (key_mean.cuh). d: of the row's statistics.
__device__ inline float sum_of_ds(BackwardParams const& params, SeqlenInfo const& info, int head, int query,
                                  float d) {
    float const lse = row_value(params.lse, info, head, query);
    if (lse == -INFINITY) {
        return 0.0f;
    }
    float sum = params.dlse.ptr != nullptr ? row_value(params.dlse, info, head, query) : 0.0f;
    if (params.scores.sinks != nullptr) {
        sum += d * ptx::exp2((params.scores.sinks[head] - lse) * kLog2E);
    }
    return sum;
}

// What a row of dQ lacks: a factor for each channel, times the row's own.
template <class Config>
class MissingShare {
  public:
    __device__ MissingShare(BackwardParams const& params, WorkTile const& tile)
        : params_(params),
          head_(tile.head),
          head_kv_(tile.head / (params.heads_q / params.heads_kv)),
          batch_(tile.batch),
          mean_(params, tile.batch, head_kv_) {}

    __device__ bool given() const {
        if constexpr (Config::kFp8) {
            bool const sums = params_.dlse.ptr != nullptr || params_.scores.sinks != nullptr;
            return sums && params_.scores.softcap == 0.0f;
        } else {
            return mean_.given();
        }
    }

    __device__ float of_row(SeqlenInfo const& info, int64_t block, int row, int query) const {
        constexpr int kBlockM = Config::Tiles::kBlockM;
        auto const& stats =
            reinterpret_cast<BlockStats<kBlockM, Config::kFp8> const*>(params_.row_stats)[block];
        if constexpr (Config::kFp8) {
            return stats.ds_sum[row];
        } else {
            return sum_of_ds(params_, info, head_, query, stats.rows.d[row]);
        }
    }

    // Of two channels.
    __device__ float2 of_channels(int channel) const {
        if constexpr (Config::kFp8) {
            if (channel >= params_.head_dim) {
                return make_float2(0.0f, 0.0f);
            }
            int64_t const head = static_cast<int64_t>(batch_) * params_.heads_kv + head_kv_;
            float const* const own = params_.key_mean + head * Config::kHeadDim + channel;
            ChannelRef const& given = params_.k_mean;
            if (given.ptr == nullptr) {
                return make_float2(own[0], own[1]);
            }
            float const* const mean =
                given.ptr + batch_ * given.batch_stride + head_kv_ * given.head_stride + channel;
            return make_float2(own[0] + mean[0], own[1] + mean[1]);
        } else {
            return mean_.at(channel);
        }
    }

  private:
    BackwardParams const& params_;
    int head_;
    int head_kv_;
    int batch_;
    KeyMean<typename Config::Element> mean_;
};

// Every query of the sequence in this block is written: zero where it is not used. The threads stand for
// those of the warpgroups that have made the sums.
__device__ inline void store_dq(BackwardParams const& params, WorkTile const& tile) {
    using Tiles = Config::Tiles;
    SeqlenInfo const info = SeqlenInfo::read(params.sequences, tile.batch, tile.offset_q);
    int const part = threadIdx.x / 128;
    int const thread = threadIdx.x % 128;
    int64_t const block = tile.head * params.query_blocks +
                          first_query_block<Tiles::kBlockM>(params, tile.batch, tile.offset_q) + tile.m_block;
    float const* const sums = params.dq_accum + block * Tiles::kDqFloats + part * Tiles::kDqPart;
    constexpr int kVectors = Tiles::kDqColumns / 8;
    float dq[4 * kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        float4 const four = reinterpret_cast<float4 const*>(sums)[i * 128 + thread];
        dq[4 * i] = four.x;
        dq[4 * i + 1] = four.y;
        dq[4 * i + 2] = four.z;
        dq[4 * i + 3] = four.w;
    }
    MissingShare<Config> const share(params, tile);
    int const first_row = Tiles::kSplitDqRows ? part * 64 : 0;
    int const first_column = Tiles::kSplitDqRows ? 0 : part * Tiles::kDqColumns;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
        int const row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
        int const query = tile.m_block * Tiles::kBlockM + row;
        int64_t const target = info.offset_q + static_cast<int64_t>(query);
        if (share.given() && query < info.seqlen_q) {
            float const sum = share.of_row(info, block, row, query);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                float2 const m = share.of_channels(first_column + 8 * i + 2 * (thread % 4));
                dq[4 * i + 2 * r] += sum * m.x;
                dq[4 * i + 2 * r + 1] += sum * m.y;
            }
        }
        store_row<Config::Element, Tiles::kDqColumns>(
            row_of(params.dq, info.batch_q, target, tile.head) + first_column, query < info.rows_q,
            query < info.seqlen_q, [&](int i) { return dq[i]; }, r, params.scores.softmax_scale,
            params.head_dim - first_column);
    }
}

// What a thread adds up of a head's blocks. Between packed sequences there may be blocks without queries,
// which nobody has written: there a warp goes through the blocks of a sequence, which starts at the largest
// offset so far.
__device__ inline float part_of_dsink(BackwardParams const& params, float const* blocks) {
    SequenceParams const& sequences = params.sequences;
    float sum = 0.0f;
    if (sequences.cu_seqlens_q == nullptr) {
        for (int64_t block = threadIdx.x; block < params.query_blocks; block += Config::kThreads) {
            sum += blocks[block];
        }
        return sum;
    }
    constexpr int kBlockM = Config::Tiles::kBlockM;
    constexpr int kWarps = Config::kThreads / 32;
    int const total = static_cast<int>(sequences.total_q);
    int const lane = threadIdx.x % 32;
    int begin = 0;
    for (int batch = threadIdx.x / 32; batch < sequences.batch; batch += kWarps) {
        // Offsets since the warp's last sequence, a lane each.
        int const index = batch - lane;
        bool const is_new = lane < kWarps && index >= 0;
        int const offset = is_new ? clamped(sequences.cu_seqlens_q[index], 0, total) : 0;
        begin = max(begin, __reduce_max_sync(0xffffffff, offset));
        int const queries = clamped(sequences.cu_seqlens_q[batch + 1], begin, total) - begin;
        int64_t const first = first_query_block<kBlockM>(params, batch, begin);
        int const count = queries / kBlockM + (queries % kBlockM != 0);
        for (int i = lane; i < count; i += 32) {
            sum += blocks[first + i];
        }
    }
    return sum;
}

// The sum of a head's blocks, in an order that never changes. By the whole CTA.
__device__ inline void store_dsink(BackwardParams const& params, int head) {
    __shared__ float sums[Config::kThreads];
    float const mine = part_of_dsink(params, params.dsinks_partial + head * params.query_blocks);
    sums[threadIdx.x] = mine;
    __syncthreads();
#pragma unroll
    for (int half = Config::kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        params.dsinks[head] = sums[0];
    }
}

// dK and dV of a block of keys. By the whole CTA.
__device__ inline void add_up_splits(BackwardParams const& params, int index) {
    using Tiles = Config::Tiles;
    __shared__ KeyTile tile;
    if (threadIdx.x < 32) {
        KeyTile const found = read_key_block<Tiles::kBlockM, Tiles::kBlockN>(params, index, 1);
        if (threadIdx.x == 0) {
            tile = found;
        }
    }
    __syncthreads();
    if (tile.valid()) {
        HeadSplits<Tiles, Config::Element>(params, tile).store();
    }
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::Config::describe(
    flash8::KernelKind::kBackwardPostprocess, "flash8_backward_postprocess", flash8::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads)
    flash8_backward_postprocess(flash8::BackwardParams const __grid_constant__ params) {
    using namespace flash8;
    if (params.head_splits > 1) {
        int const by_queries = params.heads_q * max(1, static_cast<int>(params.query_blocks));
        int const by_keys = static_cast<int>(blockIdx.x) - by_queries;
        if (by_keys >= 0) {
            add_up_splits(params, by_keys);
            return;
        }
    }
    WorkTile const tile = query_tile<Config::Tiles::kBlockM>(params);
    if (tile.valid()) {
        store_dq(params, tile);
    }
    if (params.dsinks != nullptr && static_cast<int>(blockIdx.x) < params.heads_q) {
        store_dsink(params, static_cast<int>(blockIdx.x));
    }
}
