// The accumulators of a warp, and what happens to the scores of a row tile, eight rows, between the two
// products.
//
// `score` (i, c) is accumulator c of step i of the keys: key 16 i + group + 8 (c / 2), row 8 n + 2 place +
// c % 2.

#pragma once

#include "rows.cuh"

#include <cfloat>

namespace flash8 {

// O and the sums are of 2^(score - reference), scores in log2 units. -FLT_MAX is the reference of a row that
// has seen no key.
template <class Config>
struct Accumulators {
    // Of row tiles whose softmax this warp has: of a team, each of the first warps has one.
    static constexpr int kOwnRowTiles = Config::kTeamWarps == 1 ? Config::kRowTiles : 1;

    typename Products<Config>::Out o;
    float reference[kOwnRowTiles][2];
    float sum[kOwnRowTiles][2];  // of this lane's keys
    float unit;                  // of O, with descales by key

    __device__ void clear() {
        unit = 1.0f;
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
            for (int c = 0; c < Products<Config>::kOutSteps; ++c) {
                o[n][c][0] = o[n][c][1] = o[n][c][2] = o[n][c][3] = 0.0f;
            }
        }
#pragma unroll
        for (int n = 0; n < kOwnRowTiles; ++n) {
            reference[n][0] = reference[n][1] = -FLT_MAX;
            sum[n][0] = sum[n][1] = 0.0f;
        }
    }

    // To a new reference of the lane's two rows of row tile n; only if some row of the warp has one.
    __device__ __forceinline__ void rescale(int n, float const (&alpha)[2]) {
        if (__any_sync(0xffffffff, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
            for (int c = 0; c < Products<Config>::kOutSteps; ++c) {
                o[n][c][0] *= alpha[0];
                o[n][c][1] *= alpha[1];
                o[n][c][2] *= alpha[0];
                o[n][c][3] *= alpha[1];
            }
        }
    }
};

template <class Config>
class RowTileSoftmax {
    static constexpr int kKeySteps = Config::kKeySteps;
    using TileMask = typename Config::TileMask;

  public:
    // Softcap and ALiBi; the scores are logits afterwards. `position`: of the tile's first key in the cache.
    template <class Score>
    __device__ __forceinline__ static void modify(DecodeParams const& params,
                                                  SharedStorage<Config> const& shared, int n, int position,
                                                  Score const& score) {
        float const cap = params.scores.softcap;
        float const per_cap = cap > 0.0f ? 1.0f / cap : 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float const distance = static_cast<float>(shared.own_key[row(n, r)] - position);
            float const scale = shared.score_scale[row(n, r)];
            float const slope = shared.slope[row(n, r)];
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& value = score(i, 2 * h + r);
                    value *= scale;
                    if (cap > 0.0f) {
                        value = cap * ptx::tanh(value * per_cap);
                    }
                    value -= slope * fabsf(distance - static_cast<float>(key(i, h)));
                }
            }
        }
    }

    template <class Score>
    __device__ __forceinline__ static void mask(DecodeParams const& params, TileMask const& mask,
                                                Segment const& segment, SequenceWork<Config> const& sequence,
                                                int n, int position, Score const& score) {
        int const first = position - sequence.info.offset_k;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int const query = UnitRow::of<Config>(params, segment, row(n, r)).query;
            KeyRange const seen = mask.visible_keys(query);
            uint32_t const hidden = hidden_new_keys(params, sequence, query);
            int const first_new = sequence.first_new_key() - first;
            int const begin = max(seen.begin, 0) - first;
            int const end = seen.end - first;
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    bool const visible = key(i, h) >= begin && key(i, h) < end &&
                                         (bits_from(hidden, key(i, h) - first_new) & 1) == 0;
                    score(i, 2 * h + r) = visible ? score(i, 2 * h + r) : -INFINITY;
                }
            }
        }
    }

    // Turns scores into P. `alpha` are the factors of O.
    template <class Score>
    __device__ __forceinline__ static void exponentiate(float const (&scale)[2], float (&references)[2],
                                                        float (&sums)[2], float (&alpha)[2],
                                                        Score const& score) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float maximum = fmaxf(score(0, r), score(0, 2 + r));
#pragma unroll
            for (int i = 1; i < kKeySteps; ++i) {
                maximum = fmaxf(maximum, fmaxf(score(i, r), score(i, 2 + r)));
            }
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, lanes));
            }
            float const factor = Config::kScoreMod ? kLog2E : scale[r];
            float const reference = fmaxf(references[r], with_offset(maximum * factor));
            alpha[r] = ptx::exp2(references[r] - reference);
            references[r] = reference;
            float sum = sums[r] * alpha[r];
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& value = score(i, 2 * h + r);
                    value = ptx::exp2(value * factor - reference);
                    sum += value;
                }
            }
            sums[r] = sum;
        }
    }

    // P of step i as a fragment of the second operand.
    template <class Score>
    __device__ __forceinline__ static uint2 fragment(int i, Score const& score) {
        return make_uint2(
            ptx::transpose_matrix(ptx::pack_pair<Config::kArithmetic>(score(i, 0), score(i, 1))),
            ptx::transpose_matrix(ptx::pack_pair<Config::kArithmetic>(score(i, 2), score(i, 3))));
    }

  private:
    // A bit for each new key, set where the query does not see it.
    __device__ __forceinline__ static uint32_t hidden_new_keys(DecodeParams const& params,
                                                               SequenceWork<Config> const& sequence,
                                                               int query) {
        if (params.tree_mask == nullptr || query >= sequence.queries) {
            return 0;
        }
        SeqlenInfo const& info = sequence.info;
        return ~params.tree_mask[info.batch_q * params.tree_mask_stride + info.offset_q + query];
    }

    // None below bit 0 and above bit 31: a shift by 32 and more leaves nothing, and a negative number is
    // more.
    __device__ __forceinline__ static uint32_t bits_from(uint32_t word, int bit) {
        uint32_t shifted;
        asm("shr.b32 %0, %1, %2;" : "=r"(shifted) : "r"(word), "r"(bit));
        return shifted;
    }

    __device__ __forceinline__ static int key(int i, int h) {
        return 16 * i + 8 * h + static_cast<int>(threadIdx.x % 32) / 4;
    }

    __device__ __forceinline__ static int row(int n, int r) {
        return 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + r;
    }

    // The reference that makes P of the largest score 2^kOffset. Where a score's own rounding is coarse, the
    // offset would drown in it, and P might overflow.
    __device__ __forceinline__ static float with_offset(float score) {
        if constexpr (Config::kOffset == 0.0f) {
            return score;
        } else {
            return fabsf(score) < 0x1p24f ? score - Config::kOffset : score;
        }
    }
};

}  // namespace flash8
