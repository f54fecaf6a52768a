// Split K: the CTAs of a cluster each have a range of the K of one tile, and their sums are added up in the
// order of their ranks, through distributed shared memory.
//
//   warp w of a CTA                          warp w of the CTA that adds up the part
//   its sums, over its range of K            likewise
//   waits until the whole cluster runs
//   sends the part, st.async     ------>     waits for full[w]: the part of all other CTAs
//                                            adds them up, and its own, and stores rows of out
//
// A CTA ends when what it waits for has come, and it waits for all that is sent to it: nothing is written to
// the shared memory of a CTA that has ended. Each CTA has one tile, so nothing is received a second time.

#pragma once

#include "small_m_tile_walk.cuh"

namespace flash8::small_m {

class SplitK {
  public:
    // By one thread, before the cluster barrier behind which others send.
    __device__ static void init(GemmParams const& params, ReceivedSums& received) {
        SplitK const here(params);
        for (int warp = 0; warp < Config::kConsumerWarps; ++warp) {
            ptx::mbarrier_init(&received.full[warp], 1);
            int const parts = here.is_own(2 * warp) + here.is_own(2 * warp + 1);
            ptx::mbarrier_expect_tx(&received.full[warp], parts * (here.splits_ - 1) * kPartBytes);
        }
    }

    // By all lanes of a consumer warp, once: sends the parts of other CTAs, and adds up those of this one.
    // Gives the rows of the tile whose sums are complete then, of which there may be none.
    __device__ static Rows add_up(GemmParams const& params, ReceivedSums& received, int m0, int warp,
                                  Config::Accumulator& sum) {
        SplitK const here(params);
        ptx::cluster_wait();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!here.is_own(2 * warp + half)) {
                here.send(received, warp, half, sum);
            }
        }
        Rows rows{m0 + kPartRows, m0 + kPartRows};
        ptx::mbarrier_wait_cluster(&received.full[warp], 0);  // without a part of its own it expects nothing
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (here.is_own(2 * warp + half)) {
                here.add_part(received, warp, half, sum);
                (half == 0 ? rows.begin : rows.end) += half == 0 ? -kPartRows : kPartRows;
            }
        }
        return {rows.begin, min(rows.end, params.m)};
    }

  private:
    static constexpr int kPartRows = Config::kBlockM / 2;
    static constexpr int kPartBytes = 32 * Config::kPartFloats * static_cast<int>(sizeof(float));

    __device__ explicit SplitK(GemmParams const& params)
        : splits_(params.splits), rank_(ptx::cluster_rank()) {}

    __device__ __forceinline__ int owner(int part) const { return part * splits_ / Config::kParts; }
    __device__ __forceinline__ bool is_own(int part) const { return owner(part) == rank_; }

    // Where the owner of a part keeps what another CTA has of it.
    __device__ __forceinline__ int place(int part, int from) const {
        int const own = part % (Config::kParts / splits_);
        return own * (splits_ - 1) + (from < owner(part) ? from : from - 1);
    }

    __device__ __forceinline__ void send(ReceivedSums& received, int warp, int half,
                                         Config::Accumulator const& sum) const {
        int const part = 2 * warp + half;
        auto const* const to = &received.parts[place(part, rank_)][0][threadIdx.x % 32];
        uint32_t const target = ptx::cluster_address(to, owner(part));
        uint32_t const full = ptx::cluster_address(&received.full[warp], owner(part));
#pragma unroll
        for (int i = 0; i < Config::kPartFloats; i += 4) {
            int const at = half * Config::kPartFloats + i;
            ptx::store_async(target + i / 4 * 32 * sizeof(float4), full, sum(at), sum(at + 1), sum(at + 2),
                             sum(at + 3));
        }
    }

    __device__ __forceinline__ void add_part(ReceivedSums const& received, int warp, int half,
                                             Config::Accumulator& sum) const {
        float total[Config::kPartFloats] = {};
#pragma unroll 1
        for (int from = 0; from < splits_; ++from) {
            auto const& part = received.parts[from == rank_ ? 0 : place(2 * warp + half, from)];
#pragma unroll
            for (int i = 0; i < Config::kPartFloats; i += 4) {
                int const at = half * Config::kPartFloats + i;
                float4 x{sum(at), sum(at + 1), sum(at + 2), sum(at + 3)};
                if (from != rank_) {
                    x = part[i / 4][threadIdx.x % 32];
                }
                total[i] = __fadd_rn(total[i], x.x);
                total[i + 1] = __fadd_rn(total[i + 1], x.y);
                total[i + 2] = __fadd_rn(total[i + 2], x.z);
                total[i + 3] = __fadd_rn(total[i + 3], x.w);
            }
        }
#pragma unroll
        for (int i = 0; i < Config::kPartFloats; ++i) {
            sum(half * Config::kPartFloats + i) = total[i];
        }
    }

    int splits_;
    int rank_;
};

}  // namespace flash8::small_m
