// The FP8 mainloop where T = P V has registers of its own beside S and O, so that the softmax of a block
// overlaps a product of the same warpgroup.
//
// As in 16 bit, Q K(j) is issued before P V(j + 1), and the softmax of block j runs while P V is in flight.
// But P V(j + 1) starts from zero and is then added to O (mainloop_fp8.cuh says why), with the alpha of block
// j + 1, which the loop carries.
//
// S, T, O and P of 128 keys take 208 of 232 registers. So nothing that is only needed before or after the
// loop may be in one while it runs (OverlapStorage), and V's position in its pipeline follows from K's.

#pragma once

#include "../arch/named_barriers.cuh"
#include "../arch/wgmma.cuh"
#include "../attention/key_walk.cuh"
#include "config.cuh"
#include "fp8_steps.cuh"

namespace flash8 {

template <class Config>
class MainloopFp8Overlapped : Fp8Steps<Config> {
    using Steps = Fp8Steps<Config>;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;
    using Descale = KeyDescale<Config::kBlockScales>;
    using Steps::kBlockN;
    using Steps::shared_;
    using Steps::state_;
    using Steps::warpgroup_;
    static_assert(Config::kColumnsPV == Config::kHeadDimV, "T is whole");

  public:
    __device__ __forceinline__ MainloopFp8Overlapped(ForwardParams const& params,
                                                     SharedStorage<Config>& shared,
                                                     ConsumerState<Config>& state,
                                                     Scores<Config> const& scores,
                                                     Dropout<Config> const& dropout, int warpgroup)
        : Steps(params, shared, state, scores, dropout, warpgroup) {}

    // As MainloopFp8::run. What is left to multiply O by is V's descale of the leftmost block.
    template <class Accumulator>
    __device__ __forceinline__ void run(Accumulator& o, BlockLocalSoftmax& softmax, KeyBlocks const& blocks,
                                        float const (&score_scale)[kRowsPerThread], bool large,
                                        Descale const& k_descale) {
        using namespace cute;
        typename Config::MmaQK mma_qk;
        typename Config::MmaPV mma_pv;
        // Q is (MMA, MMA_M, MMA_K), K and V are (MMA, MMA_N, MMA_K, stage).
        Tensor rQ = Config::TileQ::template by_rows<64>(shared_.q, warpgroup_ * 64)(_, _, _, 0);
        Tensor rK = Config::TileK::template by_rows<kBlockN>(shared_.k);
        Tensor rV = Config::TileVt::template by_rows<Config::kHeadDimV>(shared_.v);
        Tensor s = make_tensor<float>(LayoutC<kBlockN>{});
        Tensor t = make_tensor<float>(LayoutC<Config::kHeadDimV>{});
        Tensor p = make_tensor<typename Config::Element>(typename Steps::LayoutP{});
        float alpha[kRowsPerThread];  // of the block that P is of
        int const last = blocks.end - 1;

        shared_.pipeline_q.wait(state_.q);
        wait_for_keys<Config>(shared_.pipeline_k, state_.k);
        BlockDescales descales = descales_of(k_descale);
        multiply<true>(mma_qk, rQ, rK(_, _, _, state_.k.stage), s);
        warpgroup_wait<0>();
        warpgroup_fence_operand(s);
        release_and_advance<Config::kClusterM>(shared_.pipeline_k, state_.k);
        this->template softmax_step<true>(s, softmax, last, score_scale, descales.k, alpha);
        this->convert_p(s, p);
        if constexpr (Config::kVColMajor) {
            this->clear_hidden_keys(state_.k.before(), blocks, last);
        }

        auto const issue_values = [&]() __attribute__((always_inline)) {
            shared_.pipeline_v.wait(state_.k.before());
            multiply<true>(mma_pv, p, rV(_, _, _, state_.k.before().stage), t);
        };
        auto attend = [&](auto masked, int n_block) __attribute__((always_inline)) {
            constexpr bool kMasked = decltype(masked)::value;
            wait_for_keys<Config>(shared_.pipeline_k, state_.k);
            Turns::wait(warpgroup_);
            multiply<true>(mma_qk, rQ, rK(_, _, _, state_.k.stage), s);
            issue_values();
            Turns::pass_on(warpgroup_);
            if constexpr (Config::kBlockScales) {
                descales = descales_of(k_descale);
            }
            warpgroup_wait<1>();  // S is complete, P V may still run
            warpgroup_fence_operand(s);
            release<Config::kClusterM>(shared_.pipeline_k, state_.k);
            float alpha_next[kRowsPerThread];
            this->template softmax_step<kMasked>(s, softmax, n_block, score_scale, descales.k, alpha_next);
            computed_again(state_.k);
            // V arrived before its product. This second wait ends the basic block: without it ptxas moves
            // the wait for P V, which touches no memory, above the softmax that should overlap it.
            shared_.pipeline_v.wait(state_.k.before());
            promote(o, t, p, alpha);
            state_.k.advance();
            this->convert_p(s, p);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                alpha[r] = Config::kBlockScales ? alpha_next[r] * descales.v_ratio : alpha_next[r];
            }
        };
        walk_key_blocks<Config::kMask>(blocks, last, large, attend);
        release<1>(shared_.pipeline_q, state_.q);
        if constexpr (Config::kVColMajor && Config::kMask == MaskMode::kLocal) {
            if (blocks.begin + 1 < blocks.end) {
                this->clear_hidden_keys(state_.k.before(), blocks, blocks.begin);
            }
        }
        issue_values();
        promote(o, t, p, alpha);
    }

  private:
    // Of the block whose K is in this stage, before that is released. The producer has put a block's descales
    // beside its K: their addresses would take registers round the loop.
    __device__ __forceinline__ BlockDescales descales_of(Descale const& k_descale) const {
        if constexpr (Config::kBlockScales) {
            BlockDescales const found = shared_.descales[state_.k.stage];
            __syncwarp();  // the stage is released by one lane
            return found;
        } else {
            return {k_descale.of(0), 1.0f};
        }
    }

    // Hides from the compiler that what follows from the state has been computed before: it would be kept in
    // registers.
    __device__ __forceinline__ static void computed_again(PipelineState<Config::kStages>& state) {
        asm volatile("" : "+r"(state.stage), "+r"(state.parity));
    }

    // O = alpha O + T, once P V is complete.
    template <class Accumulator, class Operand>
    __device__ __forceinline__ void promote(Accumulator& o, Accumulator& t, Operand& p,
                                            float const (&alpha)[kRowsPerThread]) {
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(t);
        cute::warpgroup_fence_operand(p);
        release<Steps::kCtasOfV>(shared_.pipeline_v, state_.k.before());
#pragma unroll
        for (int i = 0; i < cute::size(t); ++i) {
            o(i) = alpha[i / 2 % 2] * o(i) + t(i);
        }
    }
};

}  // namespace flash8
