// What happens to a tile of scores between Q K^T and the softmax: softcap, then the mask.

#pragma once

#include "../ptx.cuh"
#include "../softmax.cuh"
#include "../wgmma.cuh"
#include "config.cuh"

namespace flash8 {

template <class Config>
struct Scores {
    using TileMask = Mask<Config::kMask, Config::kBlockM, Config::kBlockN>;

    // first_row: the first of this thread's two queries. With softcap the scores become tanh(inner * s), and
    // the cap is left to the softmax scale.
    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ static void apply(Accumulator& s, TileMask const& mask, int first_row,
                                                 int n_block, float const (&inner)[kRowsPerThread]) {
        auto rows = rows_of(s);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            if constexpr (Config::kSoftcap) {
#pragma unroll
                for (int i = 0; i < cute::size<1>(rows); ++i) {
                    rows(r, i) = ptx::tanh(rows(r, i) * inner[r]);
                }
            }
            if constexpr (kMasked) {
                mask.apply(cute::make_tensor(rows(r, cute::_).data(), cute::get<1>(rows.layout())),
                           first_row + 8 * r, n_block);
            }
        }
    }
};

}  // namespace flash8
