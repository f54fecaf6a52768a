// The FP8 mainloop of a consumer warpgroup: 64 rows of S = Q K^T, softmax, T = P V, O = alpha O + T.
//
// FP8 products accumulate in fewer bits than fp32. So every block of keys has a T of its own, and the
// rescaling of O adds it in fp32: an FFMA in place of the FMUL, no further instruction. T takes the registers
// of S, which is dead once P is made. So a warpgroup overlaps nothing by itself; the turns
// (named_barriers.cuh) let its softmax overlap the products of another.

#pragma once

#include "../arch/named_barriers.cuh"
#include "../arch/wgmma.cuh"
#include "../attention/key_walk.cuh"
#include "config.cuh"
#include "fp8_steps.cuh"

namespace flash8 {

template <class Config>
class MainloopFp8 : Fp8Steps<Config> {
    using Steps = Fp8Steps<Config>;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;
    using Descale = KeyDescale<Config::kBlockScales>;
    using Steps::kBlockN;
    using Steps::shared_;
    using Steps::state_;
    using Steps::warpgroup_;
    static constexpr int kChunks = Config::kHeadDimV / Config::kColumnsPV;

  public:
    __device__ __forceinline__ MainloopFp8(ForwardParams const& params, SharedStorage<Config>& shared,
                                           ConsumerState<Config>& state, Scores<Config> const& scores,
                                           Dropout<Config> const& dropout, int warpgroup)
        : Steps(params, shared, state, scores, dropout, warpgroup) {}

    // score_scale: of each row, softmax_scale_log2 times Q's descale; with softcap the scale of tanh's
    // argument without K's descale. large: scores may be too large for the unmasked loop, so the masked one
    // takes all blocks. Returns the descale of V by which O must still be multiplied.
    template <class Accumulator>
    __device__ __forceinline__ float run(Accumulator& o, BlockLocalSoftmax& softmax, KeyBlocks const& blocks,
                                         float const (&score_scale)[kRowsPerThread], bool large,
                                         Descale const& k_descale, Descale const& v_descale) {
        using namespace cute;
        typename Config::MmaQK mma_qk;
        // Q is (MMA, MMA_M, MMA_K), K is (MMA, MMA_N, MMA_K, stage).
        Tensor rQ = Config::TileQ::template by_rows<64>(shared_.q, warpgroup_ * 64)(_, _, _, 0);
        Tensor rK = Config::TileK::template by_rows<Config::kBlockN>(shared_.k);
        float k_scale = k_descale.of(blocks.end - 1);
        float v_scale = v_descale.of(blocks.end - 1);
        float v_scale_before = v_scale;

        auto attend = [&](auto masked, int n_block) __attribute__((always_inline)) {
            constexpr bool kMasked = decltype(masked)::value;
            Tensor s = make_tensor<float>(LayoutC<kBlockN>{});
            wait_for_keys<Config>(shared_.pipeline_k, state_.k);
            multiply<true>(mma_qk, rQ, rK(_, _, _, state_.k.stage), s);
            Turns::pass_on(warpgroup_);
            warpgroup_wait<0>();
            warpgroup_fence_operand(s);
            release<Config::kClusterM>(shared_.pipeline_k, state_.k);
            float alpha[kRowsPerThread];
            this->template softmax_step<kMasked>(s, softmax, n_block, score_scale, k_scale, alpha);
            Tensor p = make_tensor<typename Config::Element>(typename Steps::LayoutP{});
            this->convert_p(s, p);
            if constexpr (Config::kBlockScales) {
                float const ratio = __fdividef(v_scale_before, v_scale);
                alpha[0] *= ratio;
                alpha[1] *= ratio;
                v_scale_before = v_scale;
            }
            if constexpr (Config::kVColMajor && kMasked && Config::kMask == MaskMode::kLocal) {
                if (n_block == blocks.begin && n_block + 1 < blocks.end) {
                    this->clear_hidden_keys(state_.k, blocks, n_block);
                }
            }
            // V before the turn: this wait ends the basic block. Without it ptxas would move the wait for the
            // turn, which touches no memory, above the softmax that should run in another warpgroup's turn.
            shared_.pipeline_v.wait(state_.k);
            Turns::wait(warpgroup_);
            if constexpr (Config::kBlockScales) {
                // The next block's descales are loaded while the tensor cores work.
                int const next = max(n_block - 1, blocks.begin);
                k_scale = k_descale.of(next);
                v_scale = v_descale.of(next);
            }
            add_values(o, p, alpha);
        };

        if constexpr (Config::kVColMajor) {
            this->clear_hidden_keys(state_.k, blocks, blocks.end - 1);
        }
        shared_.pipeline_q.wait(state_.q);
        Turns::wait(warpgroup_);
        walk_key_blocks<Config::kMask>(blocks, blocks.end, large, attend);
        Turns::pass_on(warpgroup_);
        release_and_advance(shared_.pipeline_q, state_.q);
        return v_scale_before;
    }

  private:
    // O = alpha O + P V. If O is computed in chunks of columns, the next chunk's product is in flight while
    // one is promoted.
    template <class Accumulator, class Operand>
    __device__ __forceinline__ void add_values(Accumulator& o, Operand& p,
                                               float const (&alpha)[kRowsPerThread]) {
        using namespace cute;
        constexpr int kInFlight = kChunks > 1 ? 2 : 1;
        typename Config::MmaPV mma_pv;
        // (MMA, MMA_N, MMA_K, stage)
        Tensor rV = Config::TileVt::template by_rows<Config::kColumnsPV, kChunks>(shared_.v);
        using Chunk = decltype(make_tensor<float>(LayoutC<Config::kColumnsPV>{}));
        Chunk t[kInFlight];
        auto const issue = [&](int chunk) __attribute__((always_inline)) {
            Tensor values = rV(_, chunk, _, state_.k.stage);  // (MMA, MMA_K)
            auto const layout =
                make_layout(get<0>(values.layout()), Layout<_1, _0>{}, get<1>(values.layout()));
            multiply<true>(mma_pv, p, make_tensor(values.data(), layout), t[chunk % kInFlight]);
        };
        issue(0);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            if (chunk + 1 < kChunks) {
                issue(chunk + 1);
                warpgroup_wait<1>();
            } else {
                warpgroup_wait<0>();
            }
            Chunk& ready = t[chunk % kInFlight];
            warpgroup_fence_operand(ready);
            if (chunk + 1 == kChunks) {
                release_and_advance<Steps::kCtasOfV>(shared_.pipeline_v, state_.k);
            }
#pragma unroll
            for (int i = 0; i < size(ready); ++i) {
                float& sum = o(chunk * size(ready) + i);
                sum = alpha[i / 2 % 2] * sum + ready(i);
            }
        }
    }
};

}  // namespace flash8
