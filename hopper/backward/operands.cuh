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

  public:
    __device__ __forceinline__ Operands(BackwardParams const& params, SharedStorage<Config>& shared,
                                        int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    // S^T of this warpgroup's keys.
    template <class Accumulator>
    __device__ __forceinline__ void issue_s(int stage, Accumulator& s) const {
        using namespace cute;
        typename Config::MmaS mma;
        Tensor keys = Config::TileScoreK::template by_rows<64>(shared_.score_keys(), warpgroup_ * 64);
        Tensor a = made_anew(keys, stage * params_.zero);
        Tensor b = Config::TileScoreQ::template by_rows<kBlockM>(shared_.score_queries());
        multiply<true>(mma, a, b(_, _, _, stage), s);
    }

    // dP^T of the queries from part * kBlockDp on.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dp(int stage, int part, Accumulator& dp) const {
        using namespace cute;
        typename Config::MmaDp mma;
        constexpr int kQueries = Config::kBlockDp;
        Tensor keys = Config::TileV::template by_rows<64>(shared_.v, warpgroup_ * 64);
        Tensor a = made_anew(keys, stage * params_.zero);
        Tensor b = Config::TileDo::template by_rows<kQueries>(shared_.dout, part * kQueries);
        multiply<true>(mma, a, b(_, _, _, stage), dp);
    }

    template <class OperandP, class Accumulator>
    __device__ __forceinline__ void issue_dv(int stage, OperandP& p, Accumulator& dv) const {
        using namespace cute;
        typename Config::MmaDv mma;
        Tensor b = Config::TileDo::template by_columns<Config::kHeadDimV>(shared_.dout);
        multiply<false>(mma, p, b(_, _, _, stage), dv);
    }

    template <class OperandP, class Accumulator>
    __device__ __forceinline__ void issue_dk(int stage, OperandP& ds, Accumulator& dk) const {
        using namespace cute;
        typename Config::MmaDk mma;
        Tensor b = Config::TileQ::template by_columns<Config::kHeadDim>(shared_.q);
        multiply<false>(mma, ds, b(_, _, _, stage), dk);
    }

    // This warpgroup's part of dQ, over all keys of the block.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dq(int stage, Accumulator& dq) const {
        using namespace cute;
        typename Config::MmaDq mma;
        int const rows = Tiles::kSplitDqRows ? warpgroup_ : 0;
        int const columns = Tiles::kSplitDqRows ? 0 : warpgroup_;
        constexpr int kColumns = Config::kDqColumns;
        Tensor a = Config::TileDs::template by_rows<64>(shared_.ds, rows * 64);
        Tensor channels = Config::TileK::template by_columns<kColumns>(shared_.k, columns * kColumns);
        Tensor b = made_anew(channels, stage * params_.zero);
        Tensor ds = a(_, _, _, stage);
        multiply<true>(mma, ds, b, dq);
    }

  private:
    BackwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warpgroup_;
};

}  // namespace flash8
