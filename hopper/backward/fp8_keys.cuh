// FP8: K and V of a CTA's tile in 16 bits.

#pragma once

#include "../arch/named_barriers.cuh"
#include "../arch/swizzled_tile.cuh"
#include "config.cuh"
#include "fp8_operands.cuh"

namespace flash8 {

// K and V of a CTA's tile, by all consumer threads, which then see them, and so does the tensor core. What V
// has been read from is free then.
template <class Config>
class WideKeys {
    using Element = typename Config::Element;
    static constexpr int kRows = Config::kBlockN;
    static constexpr int kThreads = 128 * Config::kConsumerWarpgroups;

  public:
    __device__ __forceinline__ static void make(BackwardParams const& params, SharedStorage<Config>& shared,
                                                int thread) {
        KeyTileFp8 const& tile = shared.tile;
        int64_t const head = static_cast<int64_t>(tile.batch) * params.heads_kv + tile.head_kv;
        float const* const mean = Config::kSoftcap ? nullptr : params.key_mean + head * Config::kHeadDim;
        shared.pipeline_kv.wait(PipelineState<1>{});
        convert<Config::kHeadDim, Config::kPanelQ8, Config::kPanelK>(shared.k8, shared.k, tile.k_descale,
                                                                     mean, thread);
        convert<Config::kHeadDimV, Config::kPanelV8, Config::kPanelV>(shared.v8(), shared.v, 1.0f, nullptr,
                                                                      thread);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kKeysPrepared), kThreads);
    }

  private:
    template <int kColumns, int kPanel8, int kPanel>
    __device__ __forceinline__ static void convert(void const* stored, Element* wide, float factor,
                                                   float const* mean, int thread) {
        using Stored = SwizzledTile<kRows, kPanel8>;
        using Wide = SwizzledTile<kRows, kPanel * sizeof(Element)>;
        constexpr int kPieces = kColumns / 16;
#pragma unroll 1
        for (int i = thread; i < kRows * kPieces; i += kThreads) {
            int const row = i / kPieces;
            int const column = i % kPieces * 16;
            float values[16];
            unpack_e4m3(*reinterpret_cast<uint4 const*>(static_cast<char const*>(stored) +
                                                        Stored::offset(row, column)),
                        values);
            if (mean != nullptr) {
#pragma unroll
                for (int c = 0; c < 16; ++c) {
                    values[c] = values[c] * factor - mean[column + c];
                }
            }
            int const offsets[2] = {Wide::offset(row, 2 * column), Wide::offset(row, 2 * column + 16)};
            widen<Element>(values, wide, offsets, mean != nullptr ? 1.0f : factor);
        }
    }
};

}  // namespace flash8
