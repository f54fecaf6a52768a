// What the two FP8 mainloops do alike with a block of keys, between its product Q K and its product P V.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/wgmma.cuh"
#include "../attention/descales.cuh"
#include "../attention/dropout.cuh"
#include "../attention/hidden_keys.cuh"
#include "../attention/score_mod.cuh"
#include "../attention/softmax_fp8.cuh"
#include "config.cuh"
#include "mainloop.cuh"

#include <cfloat>

namespace flash8 {

template <class Config>
class Fp8Steps {
  protected:
    static constexpr int kBlockN = Config::kBlockN;
    // P as the A operand: (4 keys, 2 rows, 2 halves) of 32 keys, in the order of transpose_v.cuh.
    using LayoutP = cute::Layout<
        cute::Shape<cute::Shape<cute::_4, cute::_2, cute::_2>, cute::_1, cute::Int<kBlockN / 32>>>;
    // V from the transposer belongs to this CTA, V from TMA to the cluster.
    static constexpr int kCtasOfV = Config::kTransposeV ? 1 : Config::kClusterM;

    __device__ __forceinline__ Fp8Steps(ForwardParams const& params, SharedStorage<Config>& shared,
                                        ConsumerState<Config>& state, Scores<Config> const& scores,
                                        Dropout<Config> const& dropout, int warpgroup)
        : shared_(shared),
          state_(state),
          scores_(scores),
          dropout_(dropout),
          warpgroup_(warpgroup),
          final_scale_{final_scale(params), final_scale(params)} {}

    // Turns the scores of a block into P in place. score_scale: without K's descale. Returns in `alpha` what
    // everything accumulated so far must be multiplied by.
    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ void softmax_step(Accumulator& s, BlockLocalSoftmax& softmax, int n_block,
                                                 float const (&score_scale)[kRowsPerThread], float k_scale,
                                                 float (&alpha)[kRowsPerThread]) {
        float const scale[kRowsPerThread] = {not_zero<kMasked>(score_scale[0] * k_scale),
                                             not_zero<kMasked>(score_scale[1] * k_scale)};
        scores_.template apply<kMasked>(s, n_block, scale);
        using Exponentials =
            std::conditional_t<kMasked, typename Config::Exponentials::Exact, typename Config::Exponentials>;
        softmax.template step<kMasked && Config::kMask != MaskMode::kNone, kMasked, Exponentials>(
            rows_of(s), kScaleAppliedInScores ? final_scale_ : scale, alpha);
        dropout_.apply(s, n_block);
    }

    // Scores are (2 columns, 2 rows, kBlockN / 8); a word of P is one row of two column groups.
    template <class Accumulator, class Operand>
    __device__ __forceinline__ static void convert_p(Accumulator const& s, Operand& p) {
        auto words = cute::recast<uint32_t>(p);  // ((1, 2 rows, 2 halves), 1, kBlockN / 32)
#pragma unroll
        for (int i = 0; i < cute::size(words); ++i) {
            int const first = 8 * (i / 2) + 2 * (i % 2);
            words(i) = pack_e4m3(s(first), s(first + 1), s(first + 4), s(first + 5));
        }
    }

    // Of column-major V. By all consumer warpgroups, which meet at a barrier: so only while none of them has
    // the turn, and where registers are free.
    __device__ __forceinline__ void clear_hidden_keys(PipelineState<Config::kStages> const& state,
                                                      KeyBlocks const& blocks, int n_block) {
        SeenKeys const seen = SeenKeys::of<kBlockN>(blocks, n_block);
        if (seen.all<kBlockN>()) {
            return;
        }
        shared_.pipeline_v.wait(state);
        clear_hidden_columns<Config::kHeadDimV, kBlockN, Config::kPanelVt, Config::kConsumerWarpgroups * 128>(
            shared_.v + state.stage * Config::kElementsV, seen, threadIdx.x - 128);
    }

    SharedStorage<Config>& shared_;
    ConsumerState<Config>& state_;
    Scores<Config> const& scores_;
    Dropout<Config> const& dropout_;
    int warpgroup_;

  private:
    // If Scores applies the descales, this factor alone turns its results into log2 units.
    static constexpr bool kScaleAppliedInScores = Config::kSoftcap || Scores<Config>::kScoresInLog2;
    __device__ static float final_scale(ForwardParams const& params) {
        return Config::kSoftcap ? params.scores.softcap * kLog2E : 1.0f;
    }

    // 0 times the -inf of a hidden key would be NaN. An invalid scale stays NaN.
    template <bool kMasked>
    __device__ __forceinline__ static float not_zero(float scale) {
        return kMasked && scale < FLT_MIN ? FLT_MIN : scale;
    }

    float const final_scale_[kRowsPerThread];
};

}  // namespace flash8
