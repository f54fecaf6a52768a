// The mainloop of a consumer warpgroup: 64 keys of the CTA's block, over blocks of queries.
//
//   S^T = K Q^T    P^T = exp(S^T - LSE)    dV += P^T dO    dP^T = V dO^T    dS^T = P^T * (dP^T - D)
//   dK += dS^T Q   dQ = dS K
//
// P^T and dS^T are operands in registers. dS goes through shared memory for dQ only, of which each warpgroup
// makes a part, over the keys of both. dK and dQ are one iteration late: they fill the tensor core while the
// exponentials run. No product is in flight over the loop's back edge, where ptxas would serialise it.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/swizzled_tile.cuh"
#include "config.cuh"
#include "dq_store.cuh"
#include "kept.cuh"
#include "operands.cuh"
#include "probabilities.cuh"
#include "query_walk.cuh"

namespace flash8 {

template <class Config>
class Mainloop {
    using Element = typename Config::Element;
    using Tiles = typename Config::Tiles;
    using State = PipelineState<Config::kStages>;
    using AccumulatorS = decltype(cute::make_tensor<float>(LayoutC<Config::kBlockM>{}));
    // dP and dQ are never there together. They share registers where they are of one size; ptxas would
    // serialise products whose accumulators overlap in part.
    static constexpr bool kShare = Config::kBlockDp == Config::kDqColumns;
    static constexpr int kDqAt = kShare ? 0 : Config::kBlockDp / 2;
    static constexpr int kPool = kDqAt + Config::kDqColumns / 2;
    using Pool = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kPool>>{}));
    using OperandP = decltype(cute::make_tensor<Element>(typename Config::LayoutP{}));
    // With softcap ptxas would want too many registers for P of 128 queries at once. Fewer have no need of
    // it, and would find their masks twice.
    static constexpr bool kHalves = Config::kSoftcap && Config::kQueries == 128;

  public:
    __device__ __forceinline__ Mainloop(BackwardParams const& params, SharedStorage<Config>& shared,
                                        int warpgroup)
        : params_(params),
          shared_(shared),
          operands_(params, shared, warpgroup),
          dq_store_(params, shared, warpgroup) {
        int const thread = threadIdx.x % 128;
        int const warp = thread / 32;
        int const lane = thread % 32;
        // Where stmatrix puts dS^T as [query][key]: a warp's 16 keys are 32 bytes of its warpgroup's panel.
        ds_rows_ = ptx::shared_address(shared.ds) +
                   SwizzledTile<Config::kBlockM, 128>::offset(
                       lane / 16 * 8 + lane % 8, warpgroup * 128 + warp * 32 + lane / 8 % 2 * 16);
    }

    // The pipelines run through the query heads of the KV head.
    template <class Dk, class Dv>
    __device__ __forceinline__ void run(Dk& dk, Dv& dv) {
        AccumulatorS s;
        Pool pool;
        OperandP p;
        KeyTile const& tile = shared_.tile;
        shared_.pipeline_kv.wait(PipelineState<1>{});
        slope_ = Probabilities<Config>::slope(params_, tile, 0);
        kept_.next_head(params_, tile, 0);
        walk_query_blocks<Config::kMask>(
            tile,
            [&](auto masked, auto first, int m_block)
                __attribute__((always_inline)) { step<masked, first>(m_block, s, pool, p, dk, dv); },
            [&](int head, int blocks) __attribute__((always_inline)) {
                slope_ = Probabilities<Config>::slope(params_, tile, head);
                kept_.next_head(params_, tile, head);
                dq_store_.next_head(blocks);
            });
        finish(pool, p, dk);
    }

  private:
    template <bool kMasked, bool kFirst, class Dk, class Dv>
    __device__ __forceinline__ void step(int m_block, AccumulatorS& s, Pool& pool, OperandP& p, Dk& dk,
                                         Dv& dv) {
        auto dq = cute::make_tensor(pool.data() + kDqAt, LayoutC<Config::kDqColumns>{});
        State const before = former(now_);
        int const first_query = m_block * Config::kBlockM;
        // While no product of this warpgroup is in flight: then its accumulators leave registers.
        kept_.draw(params_, shared_, first_query);
        shared_.pipeline_q.wait(now_);
        operands_.issue_s(now_.stage, s);
        if constexpr (!kFirst) {
            operands_.issue_dk(before.stage, p, dk);
            shared_.pipeline_ds.wait(before);
            operands_.issue_dq(before.stage, dq);
        }
        cute::warpgroup_wait<kFirst ? 0 : 2>();
        cute::warpgroup_fence_operand(s);
        auto const finish_dk = [&]() __attribute__((always_inline)) {
            if constexpr (!kFirst) {
                cute::warpgroup_wait<1>();
                cute::warpgroup_fence_operand(dk);
                cute::warpgroup_fence_operand(p);
                shared_.pipeline_q.release(before);
            }
        };
        // One product may be in flight behind dQ: dV.
        auto const finish_dq = [&](auto behind) __attribute__((always_inline)) {
            if constexpr (!kFirst) {
                cute::warpgroup_wait<behind>();
                cute::warpgroup_fence_operand(dq);
                dq_store_.store(dq, 0, before.stage);
            }
        };
        float const* const lse = shared_.stats[now_.stage].lse;
        float const scale = Probabilities<Config>::score_scale(shared_, now_.stage, params_.scores);
        if constexpr (Config::kSoftcap) {
            shared_.pipeline_do.wait(now_);
            finish_dk();  // P goes where dS still is: there are no registers for the factors of both
            make_capped<0, kMasked>(s, p, lse, first_query, scale);
            if constexpr (kHalves) {
                finish_dq(cute::_0{});  // whose wait for room ends the block
                make_capped<1, kMasked>(s, p, lse, first_query, scale);
            }
        } else {
            Probabilities<Config>::template make<kMasked>(s, shared_, lse, first_query, scale, slope_);
            // dO is needed below. Asking here ends the block: ptxas would move the wait for dK, which touches
            // no memory, above the exponentials that are to run under it.
            shared_.pipeline_do.wait(now_);
            finish_dk();
            convert_p(s, p);
        }
        operands_.issue_dv(now_.stage, p, dv);
        if constexpr (!kHalves) {
            finish_dq(cute::_1{});
        }
        make_ds(s, pool, p, dv);
        shared_.pipeline_ds.commit(now_);
        now_.advance();
    }

    // P of a part of the block's queries: the first or the second half of them, or all.
    template <int kPart, bool kMasked>
    __device__ __forceinline__ void make_capped(AccumulatorS& s, OperandP& p, float const* lse,
                                                int first_query, float scale) {
        constexpr int kQueries = Config::kQueries / (kHalves ? 2 : 1);
        constexpr int kAt = kPart * kQueries / 2;
        auto part = cute::make_tensor(s.data() + kAt, LayoutC<kQueries>{});
        auto words = cute::make_tensor(cute::recast<uint32_t>(p).data() + kAt / 2,
                                       cute::Layout<cute::Int<kQueries / 4>>{});
        Probabilities<Config>::template make_capped<kMasked, kAt>(
            part, words, kept_, shared_, lse + kPart * kQueries, first_query + kPart * kQueries, scale,
            params_.scores.softcap, slope_);
    }

    // dP and dS of the present block. dV is done when the first half of dP is.
    template <class Dv>
    __device__ __forceinline__ void make_ds(AccumulatorS const& s, Pool& pool, OperandP& p, Dv& dv) {
        constexpr int kParts = Config::kBlockM / Config::kBlockDp;
        auto dp = cute::make_tensor(pool.data(), LayoutC<Config::kBlockDp>{});
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            operands_.issue_dp(now_.stage, part, dp);
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(dp);
            if (part == 0) {
                cute::warpgroup_fence_operand(dv);
                cute::warpgroup_fence_operand(p);
            }
            if (part == kParts - 1) {
                shared_.pipeline_do.release(now_);
            }
            differences(s, dp, p, part);
        }
    }

    // dS^T in P's place, and as dS in shared memory.
    template <class Dp>
    __device__ __forceinline__ void differences(AccumulatorS const& s, Dp const& dp, OperandP& p, int part) {
        constexpr int kEights = Config::kBlockDp / 8;
        float const* const d = shared_.stats[now_.stage].d + 2 * (threadIdx.x % 4);
        DifferenceFrom<Config> const differ(shared_);
        auto words = cute::recast<uint32_t>(p);
#pragma unroll
        for (int i = 0; i < kEights; ++i) {
            int const eight = part * kEights + i;
            float2 const two = *reinterpret_cast<float2 const*>(d + 8 * eight);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                int const at = 4 * eight + 2 * r;
                float const low = kept_.gradient(params_, dp(4 * i + 2 * r), at);
                float const high = kept_.gradient(params_, dp(4 * i + 2 * r + 1), at + 1);
                words(2 * eight + r) =
                    pack<Element>(differ(low, two.x) * s(at), differ(high, two.y) * s(at + 1));
            }
        }
        uint32_t const rows = ds_rows_ + now_.stage * (Config::kElementsDs * sizeof(Element));
#pragma unroll
        for (int i = part * kEights / 2; i < (part + 1) * kEights / 2; ++i) {
            ptx::store_matrices_transposed(
                rows + i * (16 * 128), {words(4 * i), words(4 * i + 1), words(4 * i + 2), words(4 * i + 3)});
        }
    }

    // dK and dQ of the last block.
    template <class Dk>
    __device__ __forceinline__ void finish(Pool& pool, OperandP& p, Dk& dk) {
        auto dq = cute::make_tensor(pool.data() + kDqAt, LayoutC<Config::kDqColumns>{});
        State const before = former(now_);
        shared_.pipeline_ds.wait(before);
        operands_.issue_dk(before.stage, p, dk);
        operands_.issue_dq(before.stage, dq);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(dk);
        cute::warpgroup_fence_operand(dq);
        dq_store_.store(dq, 0, before.stage);
        shared_.pipeline_q.release(before);
    }

    __device__ __forceinline__ void convert_p(AccumulatorS const& s, OperandP& p) const {
        auto words = cute::recast<uint32_t>(p);
#pragma unroll
        for (int i = 0; i < cute::size(words); ++i) {
            words(i) = pack<Element>(kept_.keep(s(2 * i), 2 * i), kept_.keep(s(2 * i + 1), 2 * i + 1));
        }
    }

    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    Operands<Config> operands_;
    DqStore<Config> dq_store_;
    uint32_t ds_rows_;
    State now_;  // of Q, dO and dS
    float slope_ = 0.0f;
    Kept<Config> kept_;
};

}  // namespace flash8
