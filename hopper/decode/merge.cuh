// From the accumulators of eight warps to O and LSE, or to a partial result of a unit that several CTAs
// share.
//
// Teams, mostly single warps, are added in their order, CTAs in theirs, so that equal calls give equal bits:
//
//   each CTA                                  the CTA that is last to take a ticket
//   writes its partial result
//   all threads meet
//   one thread takes a ticket (release)  -->  (acquire), all threads meet
//                                             adds the partial results of all CTAs, stores O and LSE
//                                             puts the ticket back to zero
//
// A unit's ticket is that of the first CTA that has a part of it: only one unit begins in a CTA and ends
// elsewhere. A CTA has two places for partial results, for a unit that began before it and for one that ends
// after it. With split_keys every split has a place, and a unit that one CTA has all splits of needs no
// ticket.

#pragma once

#include "softmax.cuh"

namespace flash8 {

template <class Config>
class Merge {
    using Product = Products<Config>;
    static constexpr int kBlockM = Config::kBlockM;
    static constexpr int kChannels = Config::kMergeChannels;
    static constexpr int kTeamWarps = Config::kTeamWarps;
    // Of a partial result: O, then references, then sums.
    static constexpr int kPartialO = kBlockM * Config::kHeadDimV;
    static constexpr int kPartial = kPartialO + 2 * kBlockM;

  public:
    __device__ Merge(DecodeParams const& params, SharedStorage<Config>& shared, int warp)
        : params_(params), shared_(shared), warp_(warp), team_(warp / kTeamWarps) {}

    // By all threads, once for each segment.
    __device__ void finish(Walk<Config> const& walk, Accumulators<Config>& sums) {
        Segment const& segment = walk.segment;
        SequenceWork<Config> const& sequence = walk.sequence;
        bool const whole = segment.begin == 0 && segment.end == sequence.tiles;
        bool const started_here = segment.begin == 0;
        float* const partial = params_.split_keys != 0 ? params_.partials + int64_t{segment.piece} * kPartial
                                                       : place(blockIdx.x, started_here);
        add_statistics(sums);
        int const row = threadIdx.x;
        if (row < kBlockM) {
            if (whole) {
                finish_row(segment, sequence, row);
            } else {
                partial[kPartialO + row] = shared_.merged_reference[row];
                partial[kPartialO + kBlockM + row] = shared_.merged_sum[row];
            }
        }
        scale(sums);
#pragma unroll
        for (int first = 0; first < Config::kWarpChannelsV; first += kChannels) {
            stage(sums, first);
            __syncthreads();
            each_pair<kTeamWarps * kChannels>([&](int row, int staged) {
                int const member = staged / kChannels;
                int const channel = member * Config::kWarpChannelsV + first + staged % kChannels;
                float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int warp = 0; warp < Config::kWarps; warp += kTeamWarps) {
                    float2 const part = *reinterpret_cast<float2 const*>(
                        &shared_.merge[warp + member][row][staged % kChannels]);
                    sum.x += part.x;
                    sum.y += part.y;
                }
                if (whole) {
                    store(segment, sequence, row, channel, sum);
                } else {
                    *reinterpret_cast<float2*>(partial + row * Config::kHeadDimV + channel) = sum;
                }
            });
            __syncthreads();
        }
        if (!whole && segment.ends_here && is_last_part(segment)) {
            add_parts(segment, sequence);
        }
    }

  private:
    // Partial result `part` of a unit: a split, or what a CTA has of it.
    __device__ __forceinline__ float* part_of(Segment const& segment, int part) const {
        return params_.split_keys != 0 ? params_.partials + int64_t{segment.first_piece + part} * kPartial
                                       : place(segment.first_cta + part, part == 0);
    }

    // The partial result of a unit that `cta` has a part of.
    __device__ float* place(int cta, bool starts_there) const {
        return params_.partials + (2 * int64_t{cta} + (starts_there ? 1 : 0)) * kPartial;
    }

    // Calls `act` for all rows and even channels below kCount.
    template <int kCount, class Act>
    __device__ __forceinline__ static void each_pair(Act const& act) {
        for (int i = threadIdx.x; i < kBlockM * kCount / 2; i += Config::kThreads) {
            act(i / (kCount / 2), i % (kCount / 2) * 2);
        }
    }

    // References and sums of all teams together.
    __device__ void add_statistics(Accumulators<Config>& sums) {
        int const lane = threadIdx.x % 32;
#pragma unroll
        for (int own = 0; own < Accumulators<Config>::kOwnRowTiles; ++own) {
            int const n = kTeamWarps == 1 ? own : warp_ % kTeamWarps;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = sums.sum[own][r];
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) {
                    sum += __shfl_xor_sync(0xffffffff, sum, lanes);
                }
                if (lane < 4 && n < Config::kRowTiles) {
                    shared_.reference[team_][8 * n + 2 * lane + r] = sums.reference[own][r];
                    shared_.sum[team_][8 * n + 2 * lane + r] = sum;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < kBlockM) {
            int const row = threadIdx.x;
            float reference = -FLT_MAX;
#pragma unroll
            for (int team = 0; team < Config::kTeams; ++team) {
                reference = fmaxf(reference, shared_.reference[team][row]);
            }
            float sum = 0.0f;
#pragma unroll
            for (int team = 0; team < Config::kTeams; ++team) {
                sum += shared_.sum[team][row] * ptx::exp2(shared_.reference[team][row] - reference);
            }
            shared_.merged_reference[row] = reference;
            shared_.merged_sum[row] = sum;
        }
        __syncthreads();
    }

    __device__ void scale(Accumulators<Config>& sums) const {
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int const row = 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + r;
                float factor = ptx::exp2(shared_.reference[team_][row] - shared_.merged_reference[row]);
                factor *= Config::kKeyScales ? sums.unit : 1.0f;
#pragma unroll
                for (int c = 0; c < Product::kOutSteps; ++c) {
                    sums.o[n][c][r] *= factor;
                    sums.o[n][c][2 + r] *= factor;
                }
            }
        }
    }

    __device__ __forceinline__ void stage(Accumulators<Config> const& sums, int first) {
        int const lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
            for (int c = 0; c < kChannels / 16; ++c) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int const row = 8 * n + 2 * (lane % 4) + i % 2;
                    shared_.merge[warp_][row][16 * c + Product::o_channel(lane / 4, i)] =
                        sums.o[n][first / 16 + c][i];
                }
            }
        }
    }

    // The factor of O and the LSE of a row, from its merged statistics. A sink is one more logit without a
    // value.
    __device__ void finish_row(Segment const& segment, SequenceWork<Config> const& sequence, int row) {
        UnitRow const at = UnitRow::of<Config>(params_, segment, row);
        bool const used = at.query < sequence.queries;
        float const reference = shared_.merged_reference[row];
        float const sum = shared_.merged_sum[row];
        float const* const sinks = params_.scores.sinks;
        float const shift = shared_.score_shift[row];
        float const sink = used && sinks != nullptr ? (sinks[at.head] - shift) * kLog2E : -INFINITY;
        float const top = fmaxf(sum == 0.0f ? -INFINITY : reference, sink);
        float const safe = top == -INFINITY ? 0.0f : top;
        float const factor = sum == 0.0f ? 0.0f : ptx::exp2(reference - safe);
        float const total = sum * factor + ptx::exp2(sink - safe);
        bool const empty = total == 0.0f;
        float const descale = head_descale<Config>(params_.v_descale, params_.v_scale_rows, segment);
        shared_.normalise[row] = sum == 0.0f ? 0.0f : factor / total * descale;
        shared_.weight[row] = sum == 0.0f ? 0.0f : sum * factor / total;
        if (used && params_.lse.ptr != nullptr) {
            float* const lse = params_.lse.ptr + sequence.info.batch_q * params_.lse.batch_stride +
                               at.head * params_.lse.head_stride;
            lse[sequence.info.offset_q + int64_t{at.query}] =
                empty ? -INFINITY : (safe + ptx::log2(total)) * kLn2 + shift;
        }
    }

    // Two channels of a row. finish_row has been called.
    __device__ __forceinline__ void store(Segment const& segment, SequenceWork<Config> const& sequence,
                                          int row, int channel, float2 sum) const {
        UnitRow const at = UnitRow::of<Config>(params_, segment, row);
        if (at.query >= sequence.queries || channel >= params_.head_dim_v) {
            return;
        }
        float const factor = shared_.normalise[row];
        uint16_t* const o = static_cast<uint16_t*>(params_.o.ptr) +
                            sequence.info.batch_q * params_.o.batch_stride +
                            (sequence.info.offset_q + int64_t{at.query}) * params_.o.row_stride +
                            at.head * params_.o.head_stride;
        // A row that has seen no key is zero, whatever its keys hold.
        float2 value = factor == 0.0f ? make_float2(0.0f, 0.0f) : make_float2(sum.x * factor, sum.y * factor);
        if (params_.v_mean.ptr != nullptr) {
            float const* const mean = params_.v_mean.ptr + segment.batch * params_.v_mean.batch_stride +
                                      segment.head * params_.v_mean.head_stride + channel;
            value.x += shared_.weight[row] * mean[0];
            value.y += shared_.weight[row] * mean[1];
        }
        *reinterpret_cast<uint32_t*>(o + channel) = ptx::pack_pair<Config::kOutput>(value.x, value.y);
    }

    __device__ bool is_last_part(Segment const& segment) {
        // All threads have met since they wrote their part.
        if (segment.first_cta == segment.last_cta) {
            return true;
        }
        if (threadIdx.x == 0) {
            int const first = segment.first_cta;
            int const before = ptx::add_acquire_release(params_.tickets + first, 1);
            shared_.is_last = before == segment.last_cta - first;
            if (shared_.is_last) {
                ptx::store_relaxed(params_.tickets + first, 0);  // for the next launch
            }
        }
        __syncthreads();
        return shared_.is_last;
    }

    __device__ void add_parts(Segment const& segment, SequenceWork<Config> const& sequence) {
        int const parts =
            params_.split_keys != 0 ? sequence.pieces : segment.last_cta - segment.first_cta + 1;
        auto const reference_of = [&](int part, int row) {
            return __ldcg(part_of(segment, part) + kPartialO + row);
        };
        int const row = threadIdx.x;
        if (row < kBlockM) {
            float reference = -FLT_MAX;
            for (int part = 0; part < parts; ++part) {
                reference = fmaxf(reference, reference_of(part, row));
            }
            float sum = 0.0f;
            for (int part = 0; part < parts; ++part) {
                sum += __ldcg(part_of(segment, part) + kPartialO + kBlockM + row) *
                       ptx::exp2(reference_of(part, row) - reference);
            }
            shared_.merged_reference[row] = reference;
            shared_.merged_sum[row] = sum;
            finish_row(segment, sequence, row);
        }
        __syncthreads();
        each_pair<Config::kHeadDimV>([&](int row, int channel) {
            float const reference = shared_.merged_reference[row];
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int part = 0; part < parts; ++part) {
                float const factor = ptx::exp2(reference_of(part, row) - reference);
                float2 const values = __ldcg(reinterpret_cast<float2 const*>(
                    part_of(segment, part) + row * Config::kHeadDimV + channel));
                sum.x += values.x * factor;
                sum.y += values.y * factor;
            }
            store(segment, sequence, row, channel, sum);
        });
        __syncthreads();  // the statistics are free again
    }

    DecodeParams const& params_;
    SharedStorage<Config>& shared_;
    int warp_;
    int team_;
};

}  // namespace flash8
