// What preprocess does for an FP8 forward (fp8_operands.cuh): Q in 16 bits, what rows lack by the means of K
// and V, and a mean of K to take off for dQ.

#pragma once

#include "../arch/swizzled_tile.cuh"
#include "../attention/tile_scheduler.cuh"
#include "fp8_operands.cuh"
#include "variant.cuh"

namespace flash8 {

// A query head's block of queries.
template <class Config>
class Fp8Queries {
    using Element = typename Config::Element;
    using Tiles = typename Config::Tiles;
    using TileQ = SwizzledTile<Tiles::kBlockM, 2 * Tiles::kPanelQ>;
    static constexpr int kPiece = 16;  // channels that a lane takes at a time

  public:
    __device__ Fp8Queries(BackwardParams const& params, WorkTile const& tile, SeqlenInfo const& info,
                          int64_t block)
        : params_(params),
          tile_(tile),
          info_(info),
          head_kv_(tile.head / (params.heads_q / params.heads_kv)) {
        int const first =
            min(tile.m_block * Tiles::kBlockM, info.seqlen_q - 1);  // unused rows have no descale
        descale_ = first < 0 ? 1.0f
                             : QuerySequence(params, tile.batch, info.offset_q)
                                   .descale(params.q_descale, tile.head / params.heads_per_q_descale, first);
        q16_ = static_cast<Element*>(params.q16) + block * (Tiles::kBlockM * Config::kHeadDim);
    }

    __device__ float descale() const { return descale_; }

    // Writes a row of Q in 16 bits, zero where it is not used, and returns this lane's part of q . k_mean.
    __device__ float widen_q(int row, int query, bool used, int lane) const {
        uint8_t const* const q = static_cast<uint8_t const*>(params_.q.ptr) +
                                 info_.batch_q * params_.q.batch_stride +
                                 (info_.offset_q + static_cast<int64_t>(query)) * params_.q.row_stride +
                                 tile_.head * params_.q.head_stride;
        float const* const mean = of_head(params_.k_mean);
        float sum = 0.0f;
#pragma unroll 1
        for (int column = kPiece * lane; column < Config::kHeadDim; column += kPiece * Config::kLanes) {
            int const offsets[2] = {TileQ::offset(row, 2 * column), TileQ::offset(row, 2 * column + 16)};
            bool const inside = used && column < params_.head_dim;
            uint4 const piece = inside ? *reinterpret_cast<uint4 const*>(q + column) : make_uint4(0, 0, 0, 0);
            float values[kPiece];
            unpack_e4m3(piece, values);
            widen<Element>(values, q16_, offsets, inside ? descale_ : 0.0f);
            if (inside && mean != nullptr) {
#pragma unroll
                for (int c = 0; c < kPiece; ++c) {
                    sum += values[c] * mean[column + c];
                }
            }
        }
        return sum * descale_;
    }

    // This lane's part of dO . v_mean.
    __device__ float dout_dot_mean(uint16_t const* dout, int lane) const {
        float const* const mean = of_head(params_.v_mean);
        float sum = 0.0f;
#pragma unroll 1
        for (int column = 8 * lane; mean != nullptr && column < params_.head_dim_v;
             column += 8 * Config::kLanes) {
            uint4 const words = *reinterpret_cast<uint4 const*>(dout + column);
            uint32_t const pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 const x = unpack<Element>(pairs[i]);
                sum += x.x * mean[column + 2 * i] + x.y * mean[column + 2 * i + 1];
            }
        }
        return sum;
    }

  private:
    __device__ float const* of_head(ChannelRef const& mean) const {
        return mean.ptr == nullptr ? nullptr
                                   : mean.ptr + tile_.batch * mean.batch_stride + head_kv_ * mean.head_stride;
    }

    BackwardParams const& params_;
    WorkTile const& tile_;
    SeqlenInfo const& info_;
    int head_kv_;
    float descale_;
    Element* q16_;
};

// c, by the CTA of the sequence's first queries and the KV head's first query head: the mean of a sample of
// keys that lie evenly over the sequence. dQ is exact with any c (fp8_operands.cuh). NaN counts as zero,
// since it may stand where no query looks.
template <class Config>
class KeySample {
    static constexpr int kMost = 256;  // keys
    static constexpr int kPiece = 16;  // channels of a thread
    static constexpr int kPieces = Config::kHeadDim / kPiece;
    static constexpr int kKeysAtOnce = Config::kThreads / kPieces;

  public:
    using Sums = float[kKeysAtOnce][Config::kHeadDim];

    __device__ static void store_mean(BackwardParams const& params, WorkTile const& tile,
                                      SeqlenInfo const& info, Sums& sums) {
        int const group = params.heads_q / params.heads_kv;
        if (tile.m_block != 0 || tile.head % group != 0) {
            return;
        }
        int const head_kv = tile.head / group;
        int const count = min(info.seqlen_k, kMost);
        int const slot = threadIdx.x / kPieces;
        int const column = threadIdx.x % kPieces * kPiece;
        if (slot < kKeysAtOnce) {
            float sum[kPiece] = {};
            if (column < params.head_dim) {
                add_keys(params, tile, info, head_kv, slot, count, column, sum);
            }
#pragma unroll
            for (int c = 0; c < kPiece; ++c) {
                sums[slot][column + c] = sum[c];
            }
        }
        __syncthreads();
        int64_t const head = static_cast<int64_t>(tile.batch) * params.heads_kv + head_kv;
        for (int channel = threadIdx.x; channel < Config::kHeadDim; channel += Config::kThreads) {
            float sum = 0.0f;
            for (int i = 0; i < kKeysAtOnce; ++i) {
                sum += sums[i][channel];
            }
            params.key_mean[head * Config::kHeadDim + channel] = sum / static_cast<float>(max(count, 1));
        }
    }

  private:
    __device__ static void add_keys(BackwardParams const& params, WorkTile const& tile,
                                    SeqlenInfo const& info, int head_kv, int first, int count, int column,
                                    float (&sum)[kPiece]) {
        KeySequence const sequence(params, tile.batch, info.offset_k);
        uint8_t const* const keys = static_cast<uint8_t const*>(params.k.ptr) +
                                    info.batch_k * params.k.batch_stride + head_kv * params.k.head_stride +
                                    column;
        for (int i = first; i < count; i += kKeysAtOnce) {
            int const key = static_cast<int>(static_cast<int64_t>(i) * info.seqlen_k / count);
            int64_t const row = info.offset_k + static_cast<int64_t>(key);
            float values[kPiece];
            unpack_e4m3(*reinterpret_cast<uint4 const*>(keys + row * params.k.row_stride), values);
            float const descale = sequence.descale(params.k_descale, head_kv, key);
#pragma unroll
            for (int c = 0; c < kPiece; ++c) {
                float const x = values[c] * descale;
                sum[c] += x == x ? x : 0.0f;
            }
        }
    }
};

}  // namespace flash8
