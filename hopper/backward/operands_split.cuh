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

  public:
    __device__ __forceinline__ OperandsSplit(BackwardParams const& params, SharedStorage<Config>& shared,
                                             int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    template <class Accumulator>
    __device__ __forceinline__ void issue_s(int stage, Accumulator& s) const {
        using namespace cute;
        typename Config::MmaS mma;
        constexpr int kQueries = Config::kQueries;
        Tensor keys = Config::TileScoreK::template by_rows<kBlockN>(shared_.score_keys());
        Tensor a = made_anew(keys, stage * params_.zero);
        Tensor b =
            Config::TileScoreQ::template by_rows<kQueries>(shared_.score_queries(), warpgroup_ * kQueries);
        multiply<true>(mma, a, b(_, _, _, stage), s);
    }

    // stage: of the present iteration; stage_do: of dO.
    template <class Accumulator>
    __device__ __forceinline__ void issue_dp(int stage, int stage_do, Accumulator& dp) const {
        using namespace cute;
        typename Config::MmaDp mma;
        constexpr int kQueries = Config::kQueries;
        Tensor keys = Config::TileV::template by_rows<kBlockN>(shared_.v);
        Tensor a = made_anew(keys, stage * params_.zero);
        Tensor b = Config::TileDo::template by_rows<kQueries>(shared_.dout, warpgroup_ * kQueries);
        multiply<true>(mma, a, of_ring(b, stage, stage_do), dp);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dv(int stage, int stage_do, Accumulator& dv) const {
        using namespace cute;
        typename Config::MmaDv mma;
        constexpr int kColumns = Config::kColumnsDv;
        Tensor a = Config::TileP::template by_columns<kBlockN>(shared_.p);
        Tensor p = of_ring(a, stage, 0);
        Tensor b = Config::TileDo::template by_columns<kColumns>(shared_.dout, warpgroup_ * kColumns);
        multiply<false>(mma, p, of_ring(b, stage, stage_do), dv);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dk(int stage, Accumulator& dk) const {
        using namespace cute;
        typename Config::MmaDk mma;
        constexpr int kColumns = Config::kColumnsDk;
        Tensor a = Config::TileDs::template by_columns<kBlockN>(shared_.ds);
        Tensor ds = a(_, _, _, stage);
        Tensor b = Config::TileQ::template by_columns<kColumns>(shared_.q, warpgroup_ * kColumns);
        multiply<false>(mma, ds, b(_, _, _, stage), dk);
    }

    template <class Accumulator>
    __device__ __forceinline__ void issue_dq(int stage, int slice, Accumulator& dq) const {
        using namespace cute;
        typename Config::MmaDq mma;
        constexpr int kColumns = Config::kDqColumns;
        int const first = (warpgroup_ * Tiles::kDqSlices + slice) * kColumns;
        Tensor a = Config::TileDs::template by_rows<kBlockM>(shared_.ds);
        Tensor ds = a(_, _, _, stage);
        Tensor channels = Config::TileK::template by_columns<kColumns>(shared_.k, first);
        Tensor b = made_anew(channels, stage * params_.zero);
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
