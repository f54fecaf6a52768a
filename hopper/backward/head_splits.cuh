// dK and dV of a block of keys whose query heads several CTAs share. Each CTA leaves its sums in a place of
// its own, and postprocess adds them up in the order of the splits: no atomics, and always the same bits.

#pragma once

#include "key_tile.cuh"
#include "store_rows.cuh"

namespace flash8 {

// Where the sums of a split of a tile are: warpgroup by warpgroup those of dK, then those of dV. Thread t's
// i-th four accumulators are its warpgroup's vector 128 i + t.
template <class Tiles>
__device__ __forceinline__ float* split_sums(BackwardParams const& params, KeyTile const& tile, int split) {
    // As blocks of queries (row_stats.cuh).
    int64_t const first = params.sequences.cu_seqlens_k != nullptr
                              ? tile.info.offset_k / Tiles::kBlockN + static_cast<int64_t>(tile.batch)
                              : static_cast<int64_t>(tile.batch) * params.max_n_blocks;
    int64_t const block = tile.head_kv * params.key_blocks + first + tile.n_block;
    return params.dkv_partial + (block * params.head_splits + split) * Tiles::kDkvFloats;
}

// A warpgroup's sums of dK or dV. thread: in the warpgroup.
template <int kColumns, class Accumulator>
__device__ __forceinline__ void store_split_sums(float* sums, Accumulator const& x, int thread) {
    float4* const target = reinterpret_cast<float4*>(sums) + thread;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
        target[i * 128] = make_float4(x(4 * i), x(4 * i + 1), x(4 * i + 2), x(4 * i + 3));
    }
}

// Adds up the splits of a block of keys. The threads stand for those of the warpgroups that have made the
// sums.
template <class Tiles, class Element>
class HeadSplits {
    static constexpr int kColumnsAtOnce = 32;  // what a quad transposes
    static constexpr int kVectors = kColumnsAtOnce / 8;

  public:
    __device__ HeadSplits(BackwardParams const& params, KeyTile const& tile)
        : params_(params), tile_(tile), sums_(split_sums<Tiles>(params, tile, 0)) {}

    __device__ void store() const {
        store<Tiles::kColumnsDk>(sums_, params_.dk, params_.scores.softmax_scale, params_.head_dim);
        float const dv_scale = params_.dropout.seed != nullptr ? params_.dropout.keep_scale : 1.0f;
        store<Tiles::kColumnsDv>(sums_ + Tiles::kDkFloats, params_.dv, dv_scale, params_.head_dim_v);
    }

  private:
    template <int kColumns>
    __device__ void store(float const* sums, TensorRef const& target, float factor, int columns) const {
        int const part = threadIdx.x / 128;
        int const thread = threadIdx.x % 128;
        int const first_column = Tiles::kSplitChannels ? part * kColumns : 0;
        int const first_key = (Tiles::kSplitChannels ? 0 : part * 64) + thread / 32 * 16 + thread % 32 / 4;
        // The two rows of a thread one after the other: together they would take more registers than dQ does.
#pragma unroll 1
        for (int r = 0; r < kRowsPerThread; ++r) {
            int const key = first_key + 8 * r;
            int const row = tile_.n_block * Tiles::kBlockN + key;
            uint16_t* const first = row_of(target, tile_.info.batch_k,
                                           tile_.info.offset_k + static_cast<int64_t>(row), tile_.head_kv);
            float2 const* pairs =
                reinterpret_cast<float2 const*>(sums + part * 64 * kColumns) + 2 * thread + r;
#pragma unroll 1
            for (int column = first_column; column < first_column + kColumns; column += kColumnsAtOnce) {
                float x[2 * kVectors] = {};
                float2 const* given = pairs;
#pragma unroll 1
                for (int split = 0; split < params_.head_splits; ++split) {
#pragma unroll
                    for (int i = 0; i < kVectors; ++i) {
                        float2 const two = given[i * 256];
                        x[2 * i] += two.x;
                        x[2 * i + 1] += two.y;
                    }
                    given += Tiles::kDkvFloats / 2;
                }
                pairs += kVectors * 256;
                store_row<Element, kColumnsAtOnce>(
                    first + column, row < tile_.rows_k, key < tile_.keys,
                    [&](int i) { return x[i / 4 * 2 + i % 2]; }, 0, factor, columns - column);
            }
        }
    }

    BackwardParams const& params_;
    KeyTile const& tile_;
    float const* sums_;
};

}  // namespace flash8
