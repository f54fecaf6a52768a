// The 16-bit mainloop of a consumer warpgroup: 64 rows of S = Q K^T, softmax, O += P V.
//
// Inside a warpgroup the product Q K(j) is issued before P V(j + 1), and the softmax of block j runs while P
// V is still in flight. Between warpgroups, turns (named_barriers.cuh) let the softmax of one overlap the
// products of another.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/named_barriers.cuh"
#include "../arch/wgmma.cuh"
#include "../attention/dropout.cuh"
#include "../attention/hidden_keys.cuh"
#include "../attention/key_walk.cuh"
#include "../attention/score_mod.cuh"
#include "../attention/softmax.cuh"
#include "config.cuh"
#include "page_gatherer.cuh"

namespace flash8 {

// A consumer's position in the pipelines, kept from tile to tile. FP8 finishes with a block's K and V before
// it begins the next block, so there `k` serves for both.
template <class Config>
struct ConsumerState {
    PipelineState<1> q;
    PipelineState<Config::kStages> k;
    PipelineState<Config::kStages> v;
};

template <class Config>
class Mainloop {
    using Element = typename Config::Element;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;
    static constexpr int kBlockN = Config::kBlockN;

  public:
    __device__ __forceinline__ Mainloop(ForwardParams const& params, SharedStorage<Config>& shared,
                                        ConsumerState<Config>& state, Scores<Config> const& scores,
                                        Dropout<Config> const& dropout, int warpgroup)
        : params_(params),
          shared_(shared),
          state_(state),
          scores_(scores),
          dropout_(dropout),
          warpgroup_(warpgroup) {}

    // score_scale: what `Scores` multiplies the scores by, if it does.
    template <class Accumulator>
    __device__ __forceinline__ void run(Accumulator& o, OnlineSoftmax& softmax, KeyBlocks const& blocks,
                                        float score_scale) {
        using namespace cute;
        typename Config::MmaQK mma_qk;
        typename Config::MmaPV mma_pv;
        // Q is (MMA, MMA_M, MMA_K), K and V are (MMA, MMA_N, MMA_K, stage).
        Tensor rQ =
            computed_once(Config::TileQ::template by_rows<64>(shared_.q, warpgroup_ * 64)(_, _, _, 0));
        Tensor rK = Config::TileK::template by_rows<kBlockN>(shared_.k);
        Tensor rV = Config::TileV::template by_columns<Config::kHeadDimV>(shared_.v);
        Tensor s = make_tensor<float>(LayoutC<kBlockN>{});
        // P as the A operand: eight scores of an accumulator are one k-step's fragment, in the same order.
        Tensor p = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>{});
        float alpha[kRowsPerThread];
        float const inner[kRowsPerThread] = {score_scale, score_scale};

        shared_.pipeline_q.wait(state_.q);
        wait_for_keys<Config>(shared_.pipeline_k, state_.k);
        multiply<true>(mma_qk, rQ, rK(_, _, _, state_.k.stage), s);
        warpgroup_wait<0>();
        warpgroup_fence_operand(s);
        release_and_advance<Config::kClusterM>(shared_.pipeline_k, state_.k);
        int const last = blocks.end - 1;
        scores_.template apply<true>(s, last, inner);
        using Exact = typename Config::Exponentials::Exact;
        softmax.template step<true, true, Exact>(rows_of(s), alpha);
        dropout_.apply(s, last);
        convert_p(s, p);
        clear_hidden_keys(blocks, last);

        auto advance = [&](auto masked, int n_block) __attribute__((always_inline)) {
            constexpr bool kMasked = decltype(masked)::value;
            wait_for_keys<Config>(shared_.pipeline_k, state_.k);
            if constexpr (Config::kTakeTurns) {
                Turns::wait(warpgroup_);
            }
            multiply<true>(mma_qk, rQ, rK(_, _, _, state_.k.stage), s);
            wait_for_keys<Config>(shared_.pipeline_v, state_.v);
            multiply<false>(mma_pv, p, rV(_, _, _, state_.v.stage), o);
            if constexpr (Config::kTakeTurns) {
                Turns::pass_on(warpgroup_);
            }
            warpgroup_wait<1>();  // S is complete, P V may still run
            warpgroup_fence_operand(s);
            release_and_advance<Config::kClusterM>(shared_.pipeline_k, state_.k);
            scores_.template apply<kMasked>(s, n_block, inner);
            using Exponentials = std::conditional_t<kMasked, Exact, typename Config::Exponentials>;
            softmax.template step<false, kMasked && Config::kMask != MaskMode::kNone, Exponentials>(
                rows_of(s), alpha);
            dropout_.apply(s, n_block);
            // V arrived before its product. This second wait ends the basic block: without it ptxas moves
            // the wait for P V, which touches no memory, above the softmax that should overlap it.
            shared_.pipeline_v.wait(state_.v);
            warpgroup_wait<0>();
            warpgroup_fence_operand(o);
            warpgroup_fence_operand(p);
            release_and_advance<Config::kClusterM>(shared_.pipeline_v, state_.v);
            convert_p(s, p);
            rescale(o, alpha);
        };
        walk_key_blocks<Config::kMask, Config::kMask != MaskMode::kNone>(blocks, last, false, advance);
        release_and_advance(shared_.pipeline_q, state_.q);
        if constexpr (Config::kMask == MaskMode::kLocal) {
            if (blocks.begin + 1 < blocks.end) {
                clear_hidden_keys(blocks, blocks.begin);
            }
        }
        wait_for_keys<Config>(shared_.pipeline_v, state_.v);
        multiply<false>(mma_pv, p, rV(_, _, _, state_.v.stage), o);
        warpgroup_wait<0>();
        warpgroup_fence_operand(o);
        release_and_advance<Config::kClusterM>(shared_.pipeline_v, state_.v);
    }

  private:
    // Hides from the compiler how Q's descriptor is computed. In a kernel with a single loop it would
    // otherwise compute the descriptor again for every block.
    template <class Operand>
    __device__ __forceinline__ static auto computed_once(Operand const& a) {
        auto descriptor = a.data();
        asm volatile("" : "+r"(descriptor.desc_.reg32_[0]));
        return cute::make_tensor(descriptor, a.layout());
    }

    template <class Accumulator, class Operand>
    __device__ __forceinline__ static void convert_p(Accumulator const& s, Operand& p) {
        auto words = cute::recast<uint32_t>(p);
#pragma unroll
        for (int i = 0; i < cute::size(words); ++i) {
            words(i) = pack<Element>(s(2 * i), s(2 * i + 1));
        }
    }

    template <class Accumulator>
    __device__ __forceinline__ static void rescale(Accumulator& o, float const (&alpha)[kRowsPerThread]) {
        auto rows = rows_of(o);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
            for (int i = 0; i < cute::size<1>(rows); ++i) {
                rows(r, i) *= alpha[r];
            }
        }
    }

    // By all consumer warpgroups. None of them has the turn at that time, so they can meet at a barrier.
    __device__ void clear_hidden_keys(KeyBlocks const& blocks, int n_block) {
        if constexpr (Config::kHiddenKeysAreZero) {
            return;
        }
        SeenKeys const seen = SeenKeys::of<kBlockN>(blocks, n_block);
        if (seen.all<kBlockN>()) {
            return;
        }
        shared_.pipeline_v.wait(state_.v);
        flash8::clear_hidden_keys<kBlockN, Config::kPanelV * sizeof(Element),
                                  Config::kHeadDimV / Config::kPanelV, Config::kConsumerWarpgroups * 128>(
            shared_.v + state_.v.stage * Config::kElementsV, seen, threadIdx.x - 128);
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    ConsumerState<Config>& state_;
    Scores<Config> const& scores_;
    Dropout<Config> const& dropout_;
    int warpgroup_;
};

}  // namespace flash8
