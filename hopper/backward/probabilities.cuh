// From S^T = K Q^T to P^T = exp(S - LSE). A thread holds two keys, eight apart, of the 64 of its warpgroup,
// and of every eight queries the two from 2 * (lane % 4) on.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/ptx.cuh"
#include "../arch/wgmma.cuh"
#include "../attention/alibi.cuh"
#include "../attention/softmax.cuh"
#include "config.cuh"

#include <utility>

namespace flash8 {

// The number of this thread, read again where it is needed, so that nothing made from it lives through the
// main loop.
__device__ __forceinline__ int thread_number() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// The same for what shared memory holds.
template <class T>
__device__ __forceinline__ T read_again(T const& value) {
    return *const_cast<T const volatile*>(&value);
}

// The first of this thread's two keys, counted over the keys of all consumer warpgroups.
__device__ __forceinline__ int thread_slot() {
    int const thread = thread_number() - 128;
    return thread / 32 * 16 + thread % 32 / 4;
}

// The same in the block: with split channels all warpgroups have the same keys.
template <class Config>
__device__ __forceinline__ int thread_key() {
    return Config::kSplitChannels ? thread_slot() % 64 : thread_slot();
}

// dP - D. In FP8 the product has V's values as they are stored.
template <class Config>
class DifferenceFrom {
  public:
    __device__ __forceinline__ explicit DifferenceFrom(SharedStorage<Config> const& shared) {
        if constexpr (Config::kFp8) {
            v_descale_ = read_again(shared.tile.v_descale);
        }
    }

    __device__ __forceinline__ float operator()(float dp, float d) const {
        return Config::kFp8 ? dp * v_descale_ - d : dp - d;
    }

  private:
    float v_descale_ = 1.0f;
};

template <class Config>
class Probabilities {
  public:
    __device__ __forceinline__ static void keep_visible_queries(BackwardParams const& params,
                                                                SharedStorage<Config>& shared) {
        if constexpr (Config::kMask == MaskMode::kLocal) {
            KeyTile const& tile = shared.tile;
            typename Config::KeyMask const mask(params.scores, tile.info);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                int const key = thread_key<Config>() + 8 * r;
                QueryRange const none{0, 0};
                // The lanes of a quad write the same.
                shared.visible[thread_slot() + 8 * r] =
                    key < tile.keys ? mask.visible_queries(tile.n_block * Config::kBlockN + key) : none;
            }
            __syncwarp();
        }
    }

    // ALiBi's of the tile's query head g, in log2 units.
    __device__ __forceinline__ static float slope(BackwardParams const& params, KeyTile const& tile, int g) {
        if constexpr (Config::kAlibi) {
            int const head = tile.first_head + g;
            return AlibiRow::read(params.scores, tile.batch, head, 0, kLn2).slope;
        }
        return 0.0f;
    }

    // What scores are multiplied with as the product gives them: then they are in log2 units, or with softcap
    // tanh's argument. stage: of Q.
    __device__ __forceinline__ static float score_scale(SharedStorage<Config> const& shared, int stage,
                                                        ScoreParams const& scores) {
        if constexpr (Config::kFp8) {
            return shared.stats[stage].q_descale[0] * read_again(shared.tile.score_scale);
        } else {
            return Config::kSoftcap ? scores.softmax_scale / scores.softcap : scores.softmax_scale_log2;
        }
    }

    // `slope` is ALiBi's, in log2 units.
    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ static void make(Accumulator& s, SharedStorage<Config> const& shared,
                                                float const* lse, int first_query, float scale, float slope) {
        auto rows = rows_of(s);
        subtract_lse(rows, shared, lse, first_query, scale, slope);
        if constexpr (kMasked) {
            hide(rows, shared, first_query);
        }
#pragma unroll
        for (int i = 0; i < cute::size(s); ++i) {
            s(i) = ptx::exp2(s(i));
        }
    }

    // With softcap S = cap * t, t = tanh(inner * s). Rounds P to `words`, and leaves P * (1 - t^2) in `s`:
    // what dP - D is multiplied with. `kept` is what dropout keeps of P. `s` may be that of fewer queries
    // than the block has, from the thread's accumulator kAt on.
    template <bool kMasked, int kAt = 0, class Accumulator, class Words, class Keep>
    __device__ __forceinline__ static void make_capped(Accumulator& s, Words& words, Keep const& kept,
                                                       SharedStorage<Config> const& shared, float const* lse,
                                                       int first_query, float inner, float softcap,
                                                       float slope) {
#pragma unroll
        for (int i = 0; i < cute::size(s); ++i) {
            s(i) = ptx::tanh(s(i) * inner);
        }
        auto rows = rows_of(s);
        if constexpr (kMasked) {
            hide(rows, shared, first_query);  // t = -inf
        }
        auto const* const column_lse = lse + 2 * (threadIdx.x % 4);
        float const cap = softcap * kLog2E;
        float const distance = first_distance(shared, first_query);
#pragma unroll
        for (int i = 0; i < kQueriesOf<decltype(rows)> / 8; ++i) {
            float2 const two = *reinterpret_cast<float2 const*>(column_lse + 8 * i);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                float probability[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& t = rows(r, 2 * i + c);
                    float const log2_p =
                        t * cap - (c == 0 ? two.x : two.y) - penalty(distance, r, 8 * i + c, slope);
                    probability[c] = ptx::exp2(log2_p);
                    float const finite = kMasked ? fmaxf(t, -1.0f) : t;
                    t = probability[c] * (1.0f - finite * finite);
                }
                int const at = kAt + 4 * i + 2 * r;
                words(2 * i + r) = pack<typename Config::Element>(kept.keep(probability[0], at),
                                                                  kept.keep(probability[1], at + 1));
            }
        }
    }

  private:
    template <class Rows>
    static constexpr int kQueriesOf = 4 * decltype(cute::size<1>(std::declval<Rows const&>()))::value;

    template <class Rows>
    __device__ __forceinline__ static void subtract_lse(Rows& rows, SharedStorage<Config> const& shared,
                                                        float const* lse, int first_query, float scale,
                                                        float slope) {
        int const column = 2 * static_cast<int>(threadIdx.x % 4);
        float const distance = first_distance(shared, first_query);
#pragma unroll
        for (int i = 0; i < kQueriesOf<Rows> / 8; ++i) {
            float2 const two = *reinterpret_cast<float2 const*>(lse + 8 * i + column);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = rows(r, 2 * i + c);
                    x = x * scale - (c == 0 ? two.x : two.y);
                    x -= penalty(distance, r, 8 * i + c, slope);
                }
            }
        }
    }

    // ALiBi takes slope * |position - key| off a score. Of the thread's first key and query: key - position.
    __device__ __forceinline__ static float first_distance(SharedStorage<Config> const& shared,
                                                           int first_query) {
        if constexpr (Config::kAlibi) {
            return static_cast<float>(first_visible(shared, first_query));
        }
        return 0.0f;
    }

    // Of its key 8 * r and query `column` further.
    __device__ __forceinline__ static float penalty(float distance, int r, int column, float slope) {
        return Config::kAlibi ? slope * fabsf(distance + static_cast<float>(8 * r - column)) : 0.0f;
    }

    // Under a causal mask, the first query that sees the thread's first key, counted from its first query.
    __device__ __forceinline__ static int first_visible(SharedStorage<Config> const& shared,
                                                        int first_query) {
        return read_again(shared.tile.diagonal) + thread_key<Config>() - 2 * (thread_number() % 4) -
               first_query;
    }

    template <class Rows>
    __device__ __forceinline__ static void hide(Rows& rows, SharedStorage<Config> const& shared,
                                                int first_query) {
        constexpr int kQueries = kQueriesOf<Rows>;
        if constexpr (Config::kMask == MaskMode::kNone) {
            int const keys = read_again(shared.tile.keys) - thread_key<Config>();
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                bool const visible = 8 * r < keys;
#pragma unroll
                for (int i = 0; i < kQueries / 4; ++i) {
                    rows(r, i) = visible ? rows(r, i) : -INFINITY;
                }
            }
        } else if constexpr (Config::kMask == MaskMode::kCausal) {
            hide_below(rows, first_visible(shared, first_query));
        } else {
            int const slot = thread_slot();
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                QueryRange const seen{read_again(shared.visible[slot + 8 * r].begin),
                                      read_again(shared.visible[slot + 8 * r].end)};
                auto row = cute::make_tensor(rows(r, cute::_).data(), cute::get<1>(rows.layout()));
                Mask<MaskMode::kLocal, Config::kBlockN, kQueries>::apply(row, {seen.begin, seen.end},
                                                                         first_query / kQueries);
            }
        }
    }

    // Hides queries before `begin` of the first key, counted from the thread's first. The second key is eight
    // further: what it sees of queries 8 i the first one sees of queries 8 (i - 1). So the two share
    // compares.
    template <class Rows>
    __device__ __forceinline__ static void hide_below(Rows& rows, int begin) {
        constexpr int kQueries = kQueriesOf<Rows>;
#pragma unroll
        for (int i = 0; i <= kQueries / 8; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool const visible = begin + 8 <= 8 * i + c;
                if (i >= 1) {
                    float& x = rows(0, 2 * (i - 1) + c);
                    x = visible ? x : -INFINITY;
                }
                if (i < kQueries / 8) {
                    float& x = rows(1, 2 * i + c);
                    x = visible ? x : -INFINITY;
                }
            }
        }
    }
};

}  // namespace flash8
