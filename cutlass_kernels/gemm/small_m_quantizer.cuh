// The warps that quantize A of 16 bits, a stage at a time, as flash8.gemm.quantize does by 1x128: the same
// roundings, so that the product has the bits of one of its e4m3 data and scales.

#pragma once

#include "arch/swizzled_tile.cuh"
#include "quantize/arithmetic.cuh"
#include "small_m_tile_walk.cuh"

namespace flash8::small_m {

// A row's 128 elements are those of eight lanes: each has eight of the first 64, and eight of the others.
class Quantizer {
    static constexpr int kLanes = 8;  // of a row
    static constexpr int kRows = 32 / kLanes * Config::kQuantizerWarps;
    static constexpr int kWords = 8;
    static constexpr bool kIsHalf = Config::kInput == quantize::Input::kFp16;
    static constexpr uint32_t kInfinity = kIsHalf ? 0x7c00 : 0x7f80;
    static_assert(Config::kBlockM % kRows == 0 && Config::kBlockK == 2 * kLanes * 8);

  public:
    // By all lanes of a warp. The stage must be empty, since e4m3 rows are written to it, and its rows of 16
    // bits must have come.
    __device__ static void run(GemmParams const& params, SharedStorage& shared, int warp) {
        PipelineState<Config::kStages> state;
        TileWalk tiles(params);
        KBlocks const blocks = k_blocks(params);
        int const lane = threadIdx.x % 32;
        Tile tile;
        while (tiles.next(tile)) {
#pragma unroll 1
            for (int block = blocks.begin; block < blocks.end; ++block) {
                shared.pipeline.wait_empty(state);
                ptx::mbarrier_wait(&shared.wide.full[state.stage], state.parity);
#pragma unroll
                for (int first = 0; first < Config::kBlockM; first += kRows) {
                    int const row = first + warp * (32 / kLanes) + lane / kLanes;
                    quantize_row(shared, state.stage, row, lane % kLanes);
                }
                shared.pipeline.commit(state);
                state.advance();
            }
        }
    }

  private:
    __device__ __forceinline__ static void quantize_row(SharedStorage& shared, int stage, int row, int part) {
        auto const* const from = reinterpret_cast<uint4 const*>(shared.wide.a[stage] + row * Config::kBlockK);
        uint4 const low = from[part], high = from[kLanes + part];
        uint32_t const words[kWords] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint32_t amax = largest_finite(words);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            amax = max(amax, __shfl_xor_sync(0xffffffff, amax, step));
        }
        uint32_t const bits = __float_as_uint(quantize::widen<Config::kInput>(amax));
        float const scale = quantize::descale_of<false>(bits);
        float const inverse = quantize::reciprocal(scale);
        uint32_t narrow[kWords / 2];
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i) {
            float values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t const word = words[2 * i + j / 2];
                uint32_t const element = j % 2 == 0 ? word & 0xffff : word >> 16;
                values[j] = quantize::multiply(quantize::widen<Config::kInput>(element), inverse);
            }
            narrow[i] = quantize::pack<false>(values[0], values[1], values[2], values[3]);
        }
        using Rows = SwizzledTile<Config::kBlockM, Config::kBlockK>;
        auto* const tile = reinterpret_cast<char*>(shared.a[stage]);
        *reinterpret_cast<uint2*>(tile + Rows::offset(row, 8 * part)) = make_uint2(narrow[0], narrow[1]);
        *reinterpret_cast<uint2*>(tile + Rows::offset(row, 64 + 8 * part)) = make_uint2(narrow[2], narrow[3]);
        if (part == 0) {
            shared.scales[stage].a[row] = scale;
        }
    }

    // The 16 bits of the largest magnitude, without infinities and NaN, which do not count. They are rare: a
    // maximum that leaves NaN out says whether it must be looked for again.
    __device__ __forceinline__ static uint32_t largest_finite(uint32_t const (&words)[kWords]) {
        uint32_t both = 0;
#pragma unroll
        for (uint32_t const word : words) {
            both = larger(both, word & 0x7fff7fff);
        }
        uint32_t largest = max(both & 0xffff, both >> 16);
        if (largest >= kInfinity) {
            largest = 0;
#pragma unroll
            for (uint32_t const word : words) {
                uint32_t const a = word & 0x7fff, b = word >> 16 & 0x7fff;
                largest = max(largest, max(a < kInfinity ? a : 0, b < kInfinity ? b : 0));
            }
        }
        return largest;
    }

    __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
        uint32_t c;
        if constexpr (kIsHalf) {
            asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
        } else {
            asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
        }
        return c;
    }
};

}  // namespace flash8::small_m
