// What the four warps of a team do with their tiles of a segment, where O is too large for one warp.
//
// Each warp has channels of its own, of V and O and of K, and loads them itself. With qv, V is a key as well:
// its channels lie in the slot once, for both products. What one warp has of the scores is a part of a sum
// over channels, so the warps exchange scores and P in shared memory:
//
//   every warp                                  warp n, for row tile n
//   its part of the scores
//   the team meets                         -->  adds the parts, in the order of the warps; softmax
//                                          <--  P, the factors of O; the team meets
//   O *= factors, O += V P
//
// One place is enough. Parts of the next tile are written after the second meeting, which their readers have
// passed; P of the next tile after its first meeting, at which the readers of this one's arrive.

#pragma once

#include "../arch/named_barriers.cuh"
#include "ring.cuh"
#include "softmax.cuh"

namespace flash8 {

template <class Config>
class TeamMainloop {
    using Product = Products<Config>;
    using Softmax = RowTileSoftmax<Config>;
    using Meeting = TeamMeeting<Config::kTeams, Config::kTeamWarps>;
    static constexpr int kRowTiles = Config::kRowTiles;
    static constexpr int kKeySteps = Config::kKeySteps;
    // Of a warp's steps of Q, with qv first.
    static constexpr int kStepsOfQv = Config::kQv ? Config::kWarpChannelsV / 16 : 0;
    static constexpr int kStepsOfQ = Config::kWarpChannelsK / 16;

  public:
    __device__ TeamMainloop(DecodeParams const& params, SharedStorage<Config>& shared, Share const& share,
                            int warp)
        : params_(params),
          shared_(shared),
          ring_(params, shared, share, warp),
          team_(warp / Config::kTeamWarps),
          member_(warp % Config::kTeamWarps) {}

    // The tiles of a segment that this team has. Q is in shared memory.
    __device__ void run(Walk<Config> const& walk, Accumulators<Config>& sums) {
        sums.clear();
        SequenceWork<Config> const& sequence = walk.sequence;
        KeyRange const tiles = walk.segment.template of_team<Config>(team_);
        if (tiles.begin == tiles.end) {
            return;
        }
        if constexpr (Config::kQInRegisters) {
            read_queries();
        }
        store_statistics(sums);
        int const first = sequence.first_tile();
        int const end = (first + tiles.end) * Config::kBlockN;
#pragma unroll 1
        for (int position = (first + tiles.begin) * Config::kBlockN; position < end;
             position += Config::kBlockN) {
            ring_.wait();
            store_scores();
            if constexpr (!Config::kQv) {
                ring_.template release<false>();
            }
            Meeting::wait(team_);  // the scores
            bool const edge =
                position < sequence.common_begin || position + Config::kBlockN > sequence.common_end;
            if (has_row_tile()) {
                weigh(walk, position, edge);
            }
            Meeting::wait(team_);  // P
            typename Product::Weights p;
            read_weights(p, sums);
            if constexpr (!Config::kQv) {
                ring_.wait();
            }
            if (edge) {
                ring_.clear_hidden(sequence, position);
            }
            Product::out(sums.o, ring_.address(), p);
            ring_.template release<true>();
        }
        load_statistics(sums);
    }

  private:
    // Of a thread, for addresses in shared memory. It is made anew every time, so that no address takes a
    // register over the whole loop.
    struct Place {
        int team;
        int member;
        int lane;
    };

    __device__ __forceinline__ static Place here() {
        int thread;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        return {thread / 32 / Config::kTeamWarps, thread / 32 % Config::kTeamWarps, thread % 32};
    }

    __device__ __forceinline__ bool has_row_tile() const {
        return kRowTiles == Config::kTeamWarps || member_ < kRowTiles;
    }

    // References and sums of row tile `member_` are kept in shared memory: O takes most registers.
    __device__ __forceinline__ void store_statistics(Accumulators<Config> const& sums) const {
        Place const at = here();
        if (has_row_tile()) {
            if (at.lane < 4) {
                *reference_of(at) = make_float2(sums.reference[0][0], sums.reference[0][1]);
            }
            shared_.exchange.sum[at.team][at.member][at.lane] = make_float2(sums.sum[0][0], sums.sum[0][1]);
        }
    }

    __device__ __forceinline__ void load_statistics(Accumulators<Config>& sums) const {
        Place const at = here();
        if (has_row_tile()) {
            float2 const reference = *reference_of(at);
            float2 const sum = shared_.exchange.sum[at.team][at.member][at.lane];
            sums.reference[0][0] = reference.x;
            sums.reference[0][1] = reference.y;
            sums.sum[0][0] = sum.x;
            sums.sum[0][1] = sum.y;
        }
    }

    // Of the lane's two rows.
    __device__ __forceinline__ float2* reference_of(Place const& at) const {
        return reinterpret_cast<float2*>(&shared_.reference[at.team][8 * at.member + 2 * (at.lane % 4)]);
    }

    // Where a step of this warp is among all steps of Q.
    __device__ __forceinline__ static int step_of(int member, int step) {
        constexpr int kAllOfQv = Config::kQv ? Config::kHeadDimV / 16 : 0;
        return step < kStepsOfQv ? member * kStepsOfQv + step
                                 : kAllOfQv + member * kStepsOfQ + step - kStepsOfQv;
    }

    __device__ void read_queries() {
        Place const at = here();
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int step = 0; step < Config::kWarpSteps; ++step) {
                if (step < kStepsOfQv || member_ < Config::kWarpsOfK) {
                    queries_[n][step] = shared_.q[n][step_of(at.member, step)][at.lane];
                }
            }
        }
    }

    __device__ __forceinline__ uint2 query(int step, int n, Place const& at) const {
        if constexpr (Config::kQInRegisters) {
            return queries_[n][step];
        } else {
            return shared_.q[n][step_of(at.member, step)][at.lane];
        }
    }

    template <class Change>
    __device__ __forceinline__ static void each_score(typename Product::Scores& s, Change const& change) {
#pragma unroll
        for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[i][n][c] = change(s[i][n][c]);
                }
            }
        }
    }

    // This warp's part of the scores.
    __device__ __forceinline__ void store_scores() const {
        Place const at = here();
        typename Product::Scores s;
        auto const of_qv = [&](int step, int n) { return query(step, n, at); };
        auto const of_q = [&](int step, int n) { return query(kStepsOfQv + step, n, at); };
        if constexpr (!Config::kQv) {
            Product::template scores<false, false>(s, ring_.address(), of_q);
        } else {
            if (member_ < Config::kWarpsOfK) {
                Product::template scores<false, false>(s, ring_.address_k(), of_q);
                if constexpr (Config::kFp8) {
                    each_score(s, [&](float score) { return score * shared_.key_factor; });
                }
            } else {
                each_score(s, [](float) { return 0.0f; });
            }
            Product::template scores<true, true>(s, ring_.address(), of_qv);
        }
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
                shared_.exchange.scores[at.team][at.member][n][i][at.lane] =
                    make_float4(s[i][n][0], s[i][n][1], s[i][n][2], s[i][n][3]);
            }
        }
    }

    // The softmax of row tile `member_`.
    __device__ __forceinline__ void weigh(Walk<Config> const& walk, int position, bool edge) const {
        Place const at = here();
        int const n = at.member;
        auto& exchange = shared_.exchange;
        float s[kKeySteps][4];
        auto const score = [&](int i, int c) -> float& { return s[i][c]; };
#pragma unroll
        for (int i = 0; i < kKeySteps; ++i) {
            float4 sum = exchange.scores[at.team][0][n][i][at.lane];
#pragma unroll
            for (int member = 1; member < Config::kTeamWarps; ++member) {
                float4 const part = exchange.scores[at.team][member][n][i][at.lane];
                sum.x += part.x;
                sum.y += part.y;
                sum.z += part.z;
                sum.w += part.w;
            }
            s[i][0] = sum.x;
            s[i][1] = sum.y;
            s[i][2] = sum.z;
            s[i][3] = sum.w;
        }
        if constexpr (Config::kScoreMod) {
            Softmax::modify(params_, shared_, n, position, score);
        }
        if (edge) {
            typename Config::TileMask const mask(params_, walk.sequence.info);
            Softmax::mask(params_, mask, walk.segment, walk.sequence, n, position, score);
        }
        int const row = 8 * n + 2 * (at.lane % 4);
        float const scale[2] = {shared_.score_scale[row], shared_.score_scale[row + 1]};
        float alpha[2];
        Accumulators<Config> own;  // without O
        load_statistics(own);
        Softmax::exponentiate(scale, own.reference[0], own.sum[0], alpha, score);
        __syncwarp();  // all lanes have read the references
        store_statistics(own);
#pragma unroll
        for (int i = 0; i < kKeySteps; ++i) {
            exchange.weights[at.team][n][i][at.lane] = Softmax::fragment(i, score);
        }
        if (at.lane < 4) {
            exchange.alpha[at.team][row] = alpha[0];
            exchange.alpha[at.team][row + 1] = alpha[1];
        }
    }

    // P of all rows. O is brought to its reference.
    __device__ __forceinline__ void read_weights(typename Product::Weights& p,
                                                 Accumulators<Config>& sums) const {
        auto const& exchange = shared_.exchange;
        Place const at = here();
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
                p[i][n] = exchange.weights[at.team][n][i][at.lane];
            }
            int const row = 8 * n + 2 * (at.lane % 4);
            float const alpha[2] = {exchange.alpha[at.team][row], exchange.alpha[at.team][row + 1]};
            sums.rescale(n, alpha);
        }
    }

    DecodeParams const& params_;
    SharedStorage<Config>& shared_;
    Ring<Config> ring_;
    int team_;
    int member_;
    typename Product::Queries queries_;
};

}  // namespace flash8
