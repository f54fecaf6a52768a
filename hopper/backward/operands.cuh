// The five products of an iteration, each with its operands in shared memory.

#pragma once

#include "../arch/wgmma.cuh"
#include "config.cuh"
#include "made_anew.cuh"

namespace flash8 {

template <class Config>
class Operands {
    using Tiles = typename Config::Tiles;
    static constexpr int kBlockM = Config::kBlockM;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kStages = Config::kStages;
    template <int kRows, int kColumns, int kCount>
    using Box = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kCount>>;

  public:
    __device__ __forceinline__ Operands(BackwardParams const& params, SharedStorage<Config>& shared,
                                        int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    // S^T of this warpgroup's keys.
    template <class Accumulator>
    __device__ __forceinline__ void issue_s(int stage, Accumulator& s) const {
        using namespace cute;
        typename Config::MmaS mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sK = make_tensor(make_smem_ptr(shared_.score_keys()), typename Config::SmemScoreK{});
        Tensor keys = local_tile(sK, Box<64, Config::kHeadDim, 1>{}, make_coord(warpgroup_, 0, 0));
        Tensor sQ = make_tensor(make_smem_ptr(shared_.score_queries()), typename Config::SmemScoreQ{});
        Tensor a = made_anew(thread.partition_fragment_A(keys), stage * params_.zero);
        Tensor b = thread.partition_fragment_B(sQ);
        multiply<true>(mma, a, b(_, _, _, stage), s);
    }

    // dP^T of the queries from part * kBlockDp on.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dp(int stage, int part, Accumulator& dp) const {
        using namespace cute;
        typename Config::MmaDp mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        Tensor sV = make_tensor(make_smem_ptr(shared_.v), typename Config::SmemV{});
        Tensor keys = local_tile(sV, Box<64, Config::kHeadDimV, 1>{}, make_coord(warpgroup_, 0, 0));
        Tensor sDo = make_tensor(make_smem_ptr(shared_.dout), typename Config::SmemDo{});
        Tensor queries =
            local_tile(sDo, Box<Config::kBlockDp, Config::kHeadDimV, kStages>{}, make_coord(part, 0, 0));
        Tensor a = made_anew(thread.partition_fragment_A(keys), stage * params_.zero);
        Tensor b = thread.partition_fragment_B(queries);
        multiply<true>(mma, a, b(_, _, _, stage), dp);
    }

    template <class OperandP, class Accumulator>
    __device__ __forceinline__ void issue_dv(int stage, OperandP& p, Accumulator& dv) const {
        using namespace cute;
        typename Config::MmaDv mma;
        Tensor sDot = make_tensor(make_smem_ptr(shared_.dout), typename Config::SmemDot{});
        Tensor b = mma.get_slice(threadIdx.x % 128).partition_fragment_B(sDot);
        multiply<false>(mma, p, b(_, _, _, stage), dv);
    }

    template <class OperandP, class Accumulator>
    __device__ __forceinline__ void issue_dk(int stage, OperandP& ds, Accumulator& dk) const {
        using namespace cute;
        typename Config::MmaDk mma;
        Tensor sQt = make_tensor(make_smem_ptr(shared_.q), typename Config::SmemQt{});
        Tensor b = mma.get_slice(threadIdx.x % 128).partition_fragment_B(sQt);
        multiply<false>(mma, ds, b(_, _, _, stage), dk);
    }

    // This warpgroup's part of dQ, over all keys of the block.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dq(int stage, Accumulator& dq) const {
        using namespace cute;
        typename Config::MmaDq mma;
        auto thread = mma.get_slice(threadIdx.x % 128);
        int const rows = Tiles::kSplitDqRows ? warpgroup_ : 0;
        int const columns = Tiles::kSplitDqRows ? 0 : warpgroup_;
        Tensor sDs = make_tensor(make_smem_ptr(shared_.ds), typename Config::SmemDs{});
        Tensor sKt = make_tensor(make_smem_ptr(shared_.k), typename Config::SmemKt{});
        Tensor a =
            thread.partition_fragment_A(local_tile(sDs, Box<64, kBlockN, kStages>{}, make_coord(rows, 0, 0)));
        Tensor channels = local_tile(sKt, Box<Config::kDqColumns, kBlockN, 1>{}, make_coord(columns, 0, 0));
        Tensor b = made_anew(thread.partition_fragment_B(channels), stage * params_.zero);
        Tensor ds = a(_, _, _, stage);
        multiply<true>(mma, ds, b, dq);
    }

  private:
    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warpgroup_;
};

}  // namespace flash8
