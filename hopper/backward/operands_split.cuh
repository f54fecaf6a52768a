// The five products of an iteration where the warpgroups share out the channels: S^T and dP^T of all keys and
// a warpgroup's own queries, and its half of the channels of dK, dV and dQ.

#pragma once

#include "../arch/wgmma.cuh"
#include "config.cuh"
#include "made_anew.cuh"

namespace flash8 {

template <class Config>
class OperandsSplit {
    using Tiles = typename Config::Tiles;
    static constexpr int kBlockM = Config::kBlockM;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kStages = Config::kStages;
    static constexpr int kStagesDo = Config::kStagesDo;
    template <int kRows, int kColumns, int kCount>
    using Box = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kCount>>;

  public:
    __device__ __forceinline__ OperandsSplit(BackwardParams const& params, SharedStorage<Config>& shared,
                                             int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    template <class Accumulator>
    __device__ __forceinline__ void issue_s(int stage, Accumulator& s) const {
        using namespace cute;
        typename Config::MmaS mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sK = make_tensor(make_smem_ptr(shared_.score_keys()), typename Config::SmemScoreK{});
        Tensor sQ = make_tensor(make_smem_ptr(shared_.score_queries()), typename Config::SmemScoreQ{});
        Tensor queries =
            local_tile(sQ, Box<Config::kQueries, Config::kHeadDim, kStages>{}, make_coord(warpgroup_, 0, 0));
        Tensor a = made_anew(thread.partition_fragment_A(sK), stage * params_.zero);
        Tensor b = thread.partition_fragment_B(queries);
        multiply<true>(mma, a, b(_, _, _, stage), s);
    }

    // stage: of the present iteration; stage_do: of dO.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dp(int stage, int stage_do, Accumulator& dp) const {
        using namespace cute;
        typename Config::MmaDp mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sV = make_tensor(make_smem_ptr(shared_.v), typename Config::SmemV{});
        Tensor sDo = make_tensor(make_smem_ptr(shared_.dout), typename Config::SmemDo{});
        Tensor queries = local_tile(sDo, Box<Config::kQueries, Config::kHeadDimV, kStagesDo>{},
                                    make_coord(warpgroup_, 0, 0));
        Tensor a = made_anew(thread.partition_fragment_A(sV), stage * params_.zero);
        Tensor b = thread.partition_fragment_B(queries);
        multiply<true>(mma, a, of_ring(b, stage, stage_do), dp);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dv(int stage, int stage_do, Accumulator& dv) const {
        using namespace cute;
        typename Config::MmaDv mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sPt = make_tensor(make_smem_ptr(shared_.p), typename Config::SmemPt{});
        Tensor sDot = make_tensor(make_smem_ptr(shared_.dout), typename Config::SmemDot{});
        Tensor channels =
            local_tile(sDot, Box<Config::kColumnsDv, kBlockM, kStagesDo>{}, make_coord(warpgroup_, 0, 0));
        Tensor a = thread.partition_fragment_A(sPt);
        Tensor p = of_ring(a, stage, 0);
        Tensor b = thread.partition_fragment_B(channels);
        multiply<false>(mma, p, of_ring(b, stage, stage_do), dv);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dk(int stage, Accumulator& dk) const {
        using namespace cute;
        typename Config::MmaDk mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sDst = make_tensor(make_smem_ptr(shared_.ds), typename Config::SmemDst{});
        Tensor sQt = make_tensor(make_smem_ptr(shared_.q), typename Config::SmemQt{});
        Tensor channels =
            local_tile(sQt, Box<Config::kColumnsDk, kBlockM, kStages>{}, make_coord(warpgroup_, 0, 0));
        Tensor a = thread.partition_fragment_A(sDst);
        Tensor ds = a(_, _, _, stage);
        Tensor b = thread.partition_fragment_B(channels);
        multiply<false>(mma, ds, b(_, _, _, stage), dk);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dq(int stage, int slice, Accumulator& dq) const {
        using namespace cute;
        typename Config::MmaDq mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sDs = make_tensor(make_smem_ptr(shared_.ds), typename Config::SmemDs{});
        Tensor sKt = make_tensor(make_smem_ptr(shared_.k), typename Config::SmemKt{});
        Tensor channels = local_tile(sKt, Box<Config::kDqColumns, kBlockN, 1>{},
                                     make_coord(warpgroup_ * Tiles::kDqSlices + slice, 0, 0));
        Tensor a = thread.partition_fragment_A(sDs);
        Tensor ds = a(_, _, _, stage);
        Tensor b = made_anew(thread.partition_fragment_B(channels), stage * params_.zero);
        multiply<true>(mma, ds, b, dq);
    }

  private:
    // A stage of a ring. With one stage of dO that never changes, either, and registers are short; with two
    // it would only cost instructions.
    template <class Fragment>
    __device__ __forceinline__ auto of_ring(Fragment const& fragment, int stage, int stage_of_ring) const {
        if constexpr (kStagesDo == 1) {
            return made_anew(fragment, stage * params_.zero, stage_of_ring);
        } else {
            return fragment(cute::_, cute::_, cute::_, stage_of_ring);
        }
    }

    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warpgroup_;
};

}  // namespace flash8
