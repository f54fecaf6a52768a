// The mainloop for heads wider than 128: dK and dV of 64 keys are more than one warpgroup's registers hold,
// so the warpgroups share out the channels.
//
// Each makes S^T and dP^T of all keys and half the queries. P and dS go through shared memory, as
// [query][key], where both warpgroups read them for their half of the channels of dK, dV and dQ. As in
// mainloop.cuh dK and dQ are one iteration late and no product is in flight over the back edge.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/swizzled_tile.cuh"
#include "config.cuh"
#include "dq_store.cuh"
#include "kept.cuh"
#include "operands_split.cuh"
#include "probabilities.cuh"
#include "query_walk.cuh"

namespace flash8 {

template <class Config>
class MainloopSplit {
    using Element = typename Config::Element;
    using Tiles = typename Config::Tiles;
    using State = PipelineState<Config::kStages>;
    template <int kColumns>
    using Accumulator = decltype(cute::make_tensor<float>(LayoutC<kColumns>{}));
    using AccumulatorS = Accumulator<Config::kQueries>;
    using AccumulatorDq = Accumulator<Config::kDqColumns>;
    static constexpr int kSlices = Tiles::kDqSlices;

  public:
    __device__ __forceinline__ MainloopSplit(BackwardParams const& params, SharedStorage<Config>& shared,
                                             int warpgroup)
        : params_(params),
          shared_(shared),
          operands_(params, shared, warpgroup),
          dq_store_(params, shared, warpgroup),
          first_query_(warpgroup * Config::kQueries) {
        int const warp = threadIdx.x % 128 / 32;
        int const lane = threadIdx.x % 32;
        // Where stmatrix puts P^T and dS^T as [query][key]: a warp's 16 keys are 32 bytes of a row.
        rows_ = SwizzledTile<Config::kBlockM, 128>::offset(first_query_ + lane / 16 * 8 + lane % 8,
                                                           warp * 32 + lane / 8 % 2 * 16);
    }

    // The pipelines run through the query heads of the KV head.
    template <class Dk, class Dv>
    __device__ __forceinline__ void run(Dk& dk, Dv& dv) {
        AccumulatorS s;
        AccumulatorS dp;
        AccumulatorDq dq;
        KeyTile const& tile = shared_.tile;
        shared_.pipeline_kv.wait(PipelineState<1>{});
        slope_ = Probabilities<Config>::slope(params_, tile, 0);
        kept_.next_head(params_, tile, 0);
        walk_query_blocks<Config::kMask>(
            tile,
            [&](auto masked, auto first, int m_block)
                __attribute__((always_inline)) { step<masked, first>(m_block, s, dp, dq, dk, dv); },
            [&](int head, int blocks) __attribute__((always_inline)) {
                slope_ = Probabilities<Config>::slope(params_, tile, head);
                kept_.next_head(params_, tile, head);
                dq_store_.next_head(blocks);
            });
        finish(dq, dk);
    }

  private:
    template <bool kMasked, bool kFirst, class Dk, class Dv>
    __device__ __forceinline__ void step(int m_block, AccumulatorS& s, AccumulatorS& dp, AccumulatorDq& dq,
                                         Dk& dk, Dv& dv) {
        State const before = former(now_);
        auto const once = in_ring_of<1>(now_);
        auto const state_do = in_ring_of<Config::kStagesDo>(now_);
        shared_.pipeline_q.wait(now_);
        operands_.issue_s(now_.stage, s);
        if constexpr (!kFirst) {
            shared_.pipeline_ds.wait(before);
            operands_.issue_dk(before.stage, dk);
            operands_.issue_dq(before.stage, 0, dq);
        }
        int const first_query = m_block * Config::kBlockM + first_query_;
        kept_.draw(params_, shared_, first_query);
        cute::warpgroup_wait<kFirst ? 0 : 2>();
        cute::warpgroup_fence_operand(s);
        make_p<kMasked>(first_query, s);
        shared_.pipeline_p.commit(once);
        shared_.pipeline_do.wait(state_do);
        if constexpr (!kFirst) {
            cute::warpgroup_wait<1>();
            cute::warpgroup_fence_operand(dk);
            shared_.pipeline_q.release(before);
        }
        operands_.issue_dp(now_.stage, state_do.stage, dp);
        shared_.pipeline_p.wait(once);
        operands_.issue_dv(now_.stage, state_do.stage, dv);
        if constexpr (!kFirst) {
            cute::warpgroup_wait<2>();
            cute::warpgroup_fence_operand(dq);
            dq_store_.store(dq, 0, before.stage);
            if constexpr (kSlices == 2) {
                operands_.issue_dq(before.stage, 1, dq);
            }
        }
        constexpr int kLastDq = kFirst ? 0 : kSlices - 1;  // products of dQ that may still be in flight
        cute::warpgroup_wait<kLastDq + 1>();
        cute::warpgroup_fence_operand(dp);
        multiply_differences(s, dp);
        // The other warpgroup takes dS as the sign that P may be written again: dV comes first.
        cute::warpgroup_wait<kLastDq>();
        cute::warpgroup_fence_operand(dv);
        shared_.pipeline_do.release(state_do);
        write(shared_.ds + now_.stage * Config::kElementsDs, dp, All{});
        shared_.pipeline_ds.commit(now_);
        if constexpr (kLastDq > 0) {
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(dq);
            dq_store_.store(dq, 1, before.stage);
        }
        now_.advance();
    }

    // P to shared memory; what dP - D is multiplied with stays in `s`.
    template <bool kMasked>
    __device__ __forceinline__ void make_p(int first_query, AccumulatorS& s) {
        float const* const lse = shared_.stats[now_.stage].lse + first_query_;
        float const scale = Probabilities<Config>::score_scale(shared_, now_.stage, params_.scores);
        if constexpr (Config::kSoftcap) {
            auto words = cute::make_tensor<uint32_t>(cute::Shape<cute::Int<Config::kQueries / 4>>{});
            Probabilities<Config>::template make_capped<kMasked>(s, words, kept_, shared_, lse, first_query,
                                                                 scale, params_.scores.softcap, slope_);
            write_words(shared_.p, words);
        } else {
            Probabilities<Config>::template make<kMasked>(s, shared_, lse, first_query, scale, slope_);
            write(shared_.p, s, kept_);
        }
    }

    __device__ __forceinline__ void multiply_differences(AccumulatorS const& s, AccumulatorS& dp) const {
        float const* const d = shared_.stats[now_.stage].d + first_query_ + 2 * (threadIdx.x % 4);
        DifferenceFrom<Config> const differ(shared_);
#pragma unroll
        for (int i = 0; i < Config::kQueries / 8; ++i) {
            float2 const two = *reinterpret_cast<float2 const*>(d + 8 * i);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                int const at = 4 * i + 2 * r;
                dp(at) = differ(kept_.gradient(params_, dp(at), at), two.x) * s(at);
                dp(at + 1) = differ(kept_.gradient(params_, dp(at + 1), at + 1), two.y) * s(at + 1);
            }
        }
    }

    // All of x, where dropout has no part.
    struct All {
        __device__ __forceinline__ static float keep(float x, int) { return x; }
    };

    // What is kept of x, rounded to 16 bits, as [query][key].
    template <class Keep>
    __device__ __forceinline__ void write(Element* tile, AccumulatorS const& x, Keep const& kept) const {
        auto words = cute::make_tensor<uint32_t>(cute::Shape<cute::Int<Config::kQueries / 4>>{});
#pragma unroll
        for (int i = 0; i < cute::size(words); ++i) {
            words(i) = pack<Element>(kept.keep(x(2 * i), 2 * i), kept.keep(x(2 * i + 1), 2 * i + 1));
        }
        write_words(tile, words);
    }

    template <class Words>
    __device__ __forceinline__ void write_words(Element* tile, Words const& words) const {
#pragma unroll
        for (int i = 0; i < Config::kQueries / 16; ++i) {
            ptx::store_matrices_transposed(
                ptx::shared_address(tile) + rows_ + i * (16 * 128),
                {words(4 * i), words(4 * i + 1), words(4 * i + 2), words(4 * i + 3)});
        }
    }

    // dK and dQ of the last block.
    template <class Dk>
    __device__ __forceinline__ void finish(AccumulatorDq& dq, Dk& dk) {
        State const before = former(now_);
        shared_.pipeline_ds.wait(before);
        operands_.issue_dk(before.stage, dk);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            operands_.issue_dq(before.stage, slice, dq);
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(dk);
            cute::warpgroup_fence_operand(dq);
            dq_store_.store(dq, slice, before.stage);
        }
        shared_.pipeline_q.release(before);
    }

    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    OperandsSplit<Config> operands_;
    DqStore<Config> dq_store_;
    int first_query_;  // of this warpgroup, in the block
    int rows_;         // bytes from the start of a tile of P or dS
    State now_;        // of Q and dS
    float slope_ = 0.0f;
    Kept<Config> kept_;
};

}  // namespace flash8
