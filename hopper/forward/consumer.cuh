// A consumer warpgroup: 64 rows of S = Q K^T, softmax, O += P V.
//
// Inside a warpgroup the product Q K(j) is issued before P V(j + 1), and its softmax runs while P V is still
// under way; between warpgroups, turns (named_barriers.cuh) let one's softmax overlap the other's products.

#pragma once

#include "../convert.cuh"
#include "../named_barriers.cuh"
#include "../softmax.cuh"
#include "../tile_scheduler.cuh"
#include "config.cuh"
#include "epilogue.cuh"

namespace flash8 {

template <class Config>
class Consumer {
    using Element = typename Config::Element;
    using TileMask = Mask<Config::kMask, Config::kBlockM, Config::kBlockN>;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;
    static constexpr int kBlockN = Config::kBlockN;

  public:
    __device__ Consumer(ForwardParams const& params, SharedStorage& shared, int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    __device__ void run() {
        if constexpr (Config::kTakeTurns) {
            Turns::start(warpgroup_);
        }
        for (StaticTileScheduler scheduler(params_); !scheduler.done(); scheduler.advance()) {
            work(scheduler.tile());
        }
        if constexpr (Config::kTakeTurns) {
            Turns::finish(warpgroup_);
        }
    }

  private:
    __device__ void work(WorkTile const& tile) {
        SeqlenInfo const info = SeqlenInfo::read(params_.sequences, tile.batch);
        TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(tile.m_block);
        // (MMA, MMA_M, MMA_N): ((2 columns, 2 rows, kHeadDimV / 8), 1, 1)
        auto o = cute::partition_fragment_C(typename Config::MmaPV{},
                                            cute::Shape<cute::_64, cute::Int<Config::kHeadDimV>>{});
        cute::clear(o);
        // With softcap the scores are tanh of something, and the cap is their scale.
        float const scale =
            Config::kSoftcap ? params_.scores.softcap * kLog2E : params_.scores.softmax_scale_log2;
        OnlineSoftmax softmax(scale);
        if (!blocks.empty()) {
            mainloop(o, softmax, mask, info, blocks, tile.m_block);
        }
        Epilogue<Config>::store(params_, info, tile, first_row(tile.m_block), o, softmax);
    }

    template <class Accumulator>
    __device__ __forceinline__ void mainloop(Accumulator& o, OnlineSoftmax& softmax, TileMask const& mask,
                                             SeqlenInfo const& info, KeyBlocks const& blocks, int m_block) {
        using namespace cute;
        typename Config::MmaQK mma_qk;
        typename Config::MmaPV mma_pv;
        auto thread_qk = mma_qk.get_slice(threadIdx.x % 128);
        auto thread_pv = mma_pv.get_slice(threadIdx.x % 128);
        Tensor sQ = make_tensor(make_smem_ptr(shared_.q), typename Config::SmemLayoutQ{});
        Tensor sQ_rows = local_tile(sQ, Shape<_64, Int<Config::kHeadDim>>{}, make_coord(warpgroup_, 0));
        Tensor sK = make_tensor(make_smem_ptr(shared_.k), typename Config::SmemLayoutK{});
        Tensor sVt = make_tensor(make_smem_ptr(shared_.v), typename Config::SmemLayoutVt{});
        Tensor rQ = thread_qk.partition_fragment_A(sQ_rows);  // (MMA, MMA_M, MMA_K)
        Tensor rK = thread_qk.partition_fragment_B(sK);       // (MMA, MMA_N, MMA_K, stage)
        Tensor rV = thread_pv.partition_fragment_B(sVt);      // (MMA, MMA_N, MMA_K, stage)
        Tensor s = partition_fragment_C(mma_qk, Shape<_64, Int<kBlockN>>{});
        // P as the A operand: eight scores of an accumulator are one k-step's fragment, in the same order.
        Tensor p = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>{});
        float alpha[kRowsPerThread];

        shared_.pipeline_q.wait(q_state_);
        shared_.pipeline_k.wait(k_state_);
        multiply<true>(mma_qk, rQ, rK(_, _, _, k_state_.stage), s);
        warpgroup_wait<0>();
        warpgroup_fence_operand(s);
        release(shared_.pipeline_k, k_state_);
        int n_block = blocks.end - 1;
        score<true>(s, mask, m_block, n_block);
        softmax.template step<true, true>(rows_of(s), alpha);
        round(s, p);
        clear_tail(info, n_block);

        auto advance = [&](auto masked) {
            constexpr bool kMasked = decltype(masked)::value;
            --n_block;
            shared_.pipeline_k.wait(k_state_);
            if constexpr (Config::kTakeTurns) {
                Turns::wait(warpgroup_);
            }
            multiply<true>(mma_qk, rQ, rK(_, _, _, k_state_.stage), s);
            shared_.pipeline_v.wait(v_state_);
            multiply<false>(mma_pv, p, rV(_, _, _, v_state_.stage), o);
            if constexpr (Config::kTakeTurns) {
                Turns::pass_on(warpgroup_);
            }
            warpgroup_wait<1>();  // S is there, P V may still run
            warpgroup_fence_operand(s);
            release(shared_.pipeline_k, k_state_);
            score<kMasked>(s, mask, m_block, n_block);
            softmax.template step<false, Config::kMask != MaskMode::kNone>(rows_of(s), alpha);
            warpgroup_wait<0>();
            warpgroup_fence_operand(o);
            release(shared_.pipeline_v, v_state_);
            round(s, p);
            rescale(o, alpha);
        };
        int const unmasked_begin = max(blocks.begin, blocks.left_end);
        while (n_block > max(blocks.right_begin, blocks.begin)) {
            advance(cute::true_type{});
        }
        while (n_block > unmasked_begin) {
            advance(cute::false_type{});
        }
        if constexpr (Config::kMask == MaskMode::kLocal) {
            while (n_block > blocks.begin) {
                advance(cute::true_type{});
            }
        }
        release(shared_.pipeline_q, q_state_);
        shared_.pipeline_v.wait(v_state_);
        multiply<false>(mma_pv, p, rV(_, _, _, v_state_.stage), o);
        warpgroup_wait<0>();
        warpgroup_fence_operand(o);
        release(shared_.pipeline_v, v_state_);
    }

    // Issues c (+)= a b over all k-steps as one group; the caller waits for it.
    template <bool kZero, class Mma, class A, class B, class C>
    __device__ __forceinline__ static void multiply(Mma& mma, A const& a, B const& b, C& c) {
        using namespace cute;
        warpgroup_fence_operand(c);
        warpgroup_arrive();
        mma.accumulate_ = kZero ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
        for (int k = 0; k < size<2>(a); ++k) {
            gemm(mma, a(_, _, k), b(_, _, k), c);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    }

    // An accumulator ((2, 2, N / 8), 1, 1) as (row, (column, N / 8)).
    template <class Accumulator>
    __device__ __forceinline__ static auto rows_of(Accumulator& c) {
        using namespace cute;
        auto const l = c.layout();
        return make_tensor(c.data(), make_layout(get<0, 1>(l), make_layout(get<0, 0>(l), get<0, 2>(l))));
    }

    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ void score(Accumulator& s, TileMask const& mask, int m_block,
                                          int n_block) const {
        auto rows = rows_of(s);
        if constexpr (Config::kSoftcap) {
            float const inner = params_.scores.softmax_scale / params_.scores.softcap;
#pragma unroll
            for (int i = 0; i < cute::size(s); ++i) {
                s(i) = ptx::tanh(s(i) * inner);
            }
        }
        if constexpr (kMasked) {
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                mask.apply(cute::make_tensor(rows(r, cute::_).data(), cute::get<1>(rows.layout())),
                           first_row(m_block) + 8 * r, n_block);
            }
        }
    }

    template <class Scores, class Operand>
    __device__ __forceinline__ static void round(Scores const& s, Operand& p) {
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

    // Rows of V behind the last key belong to nobody: P is zero there, but 0 * NaN is NaN. The consumers
    // clear them once, in the rightmost block, before anyone multiplies with it.
    __device__ void clear_tail(SeqlenInfo const& info, int n_block) {
        int const used = info.seqlen_k - n_block * kBlockN;
        if (used >= kBlockN) {
            return;
        }
        shared_.pipeline_v.wait(v_state_);
        uint4* const stage =
            reinterpret_cast<uint4*>(shared_.v + v_state_.stage * kBlockN * Config::kHeadDimV);
        constexpr int kThreads = Config::kConsumerWarpgroups * 128;
        constexpr int kVectorsPerRow = Config::kPanelV * sizeof(Element) / sizeof(uint4);
        constexpr int kPanels = Config::kHeadDimV / Config::kPanelV;
        int const count = (kBlockN - used) * kVectorsPerRow;
        for (int panel = 0; panel < kPanels; ++panel) {
            // The swizzle permutes within rows of a panel, so whole rows stay whole.
            uint4* const tail = stage + (panel * kBlockN + used) * kVectorsPerRow;
            for (int i = threadIdx.x - 128; i < count; i += kThreads) {
                tail[i] = make_uint4(0, 0, 0, 0);
            }
        }
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTailCleared), kThreads);
    }

    template <class P, class State>
    __device__ __forceinline__ static void release(P& pipeline, State& state) {
        pipeline.release(state);
        state.advance();
    }

    // The first of this thread's two rows.
    __device__ __forceinline__ int first_row(int m_block) const {
        int const warp = (threadIdx.x % 128) / 32;
        return m_block * Config::kBlockM + warpgroup_ * 64 + warp * 16 + (threadIdx.x % 32) / 4;
    }

    ForwardParams const& params_;
    SharedStorage& shared_;
    int warpgroup_;
    PipelineState<1> q_state_;
    PipelineState<Config::kStages> k_state_;
    PipelineState<Config::kStages> v_state_;
};

}  // namespace flash8
