// What happens to a tile of scores between Q K^T and the softmax: softcap, ALiBi, the mask.

#pragma once

#include "../arch/ptx.cuh"
#include "../arch/wgmma.cuh"
#include "alibi.cuh"
#include "pack_gqa.cuh"
#include "softmax.cuh"
#include "tile_scheduler.cuh"

namespace flash8 {

template <class Config>
class Scores {
    using TileMask = typename Config::TileMask;

  public:
    // Whether the scores come out in log2 units. Scores of e4m3 are otherwise multiplied by the descales of Q
    // and of K's block only in the softmax. An ALiBi slope needs units that are the same for every block, and
    // that do not vanish with a descale.
    static constexpr bool kScoresInLog2 = Config::kHasDescales && Config::kAlibi && !Config::kSoftcap;

    // first_row: the first of this thread's two rows.
    template <class Params>
    __device__ Scores(Params const& params, SeqlenInfo const& info, TileMask const& mask,
                      WorkTile const& tile, int first_row) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            QueryRow const row = query_row<Config::kPackGqa>(params, tile, first_row + 8 * r);
            keys_[r] = mask.visible_keys(row.query);
            if constexpr (Config::kAlibi) {
                float const unit = kScoresInLog2      ? kLn2
                                   : Config::kSoftcap ? params.scores.softcap
                                                      : params.scores.softmax_scale;
                int const position = row.query + info.seqlen_k - info.seqlen_q;
                alibi_[r] = AlibiRow::read(params.scores, tile.batch, row.head, position, unit);
            }
        }
    }

    // The most that ALiBi subtracts from a score of this thread's rows, in the units of the scores then.
    __device__ float largest_penalty(SeqlenInfo const& info) const {
        float steepest = 0.0f;
        if constexpr (Config::kAlibi) {
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                steepest = fmaxf(steepest, fabsf(alibi_[r].slope));
            }
        }
        return steepest * static_cast<float>(info.seqlen_q + info.seqlen_k);
    }

    // With softcap the scores become tanh(scale * s), and the softmax multiplies by the cap. With
    // kScoresInLog2, `scale` turns them into log2 units.
    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ void apply(Accumulator& s, int n_block,
                                          float const (&scale)[kRowsPerThread]) const {
        auto rows = rows_of(s);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            if constexpr (Config::kSoftcap) {
#pragma unroll
                for (int i = 0; i < cute::size<1>(rows); ++i) {
                    rows(r, i) = ptx::tanh(rows(r, i) * scale[r]);
                }
            }
            auto row = cute::make_tensor(rows(r, cute::_).data(), cute::get<1>(rows.layout()));
            if constexpr (Config::kAlibi) {
                alibi_[r].template apply<Config::kBlockN>(row, n_block, kScoresInLog2 ? scale[r] : 1.0f);
            }
            if constexpr (kMasked) {
                TileMask::apply(row, keys_[r], n_block);
            }
        }
    }

  private:
    KeyRange keys_[kRowsPerThread];
    AlibiRow alibi_[kRowsPerThread];
};

}  // namespace flash8
