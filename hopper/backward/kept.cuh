// Which of a thread's probabilities dropout keeps: a bit each, made anew in every iteration.
//
// A thread has two keys, eight apart, and of every eight queries two (probabilities.cuh). A draw decides over
// eight keys of one query: those of the eight lanes with the same lane % 4. So lane 4 g + t draws for the
// keys of half g / 4 and the queries 8 (g % 4 + 4 m) + 2 t + {0, 1}. It packs the eight bits of each draw
// into a byte, and the eight lanes exchange words.

#pragma once

#include "../attention/dropout.cuh"
#include "config.cuh"
#include "probabilities.cuh"

namespace flash8 {

template <class Config>
class Kept {
    static constexpr int kQueries = Config::kQueries;
    static constexpr int kRounds = kQueries / 32;                 // a lane draws for two queries in each
    static constexpr int kWords = kRounds > 1 ? kRounds / 2 : 1;  // four bytes of draws are two rounds
    static constexpr uint32_t kFirstBits = kRounds > 1 ? 0x01010101 : 0x0101;

  public:
    // For query head g of the tile.
    __device__ __forceinline__ void next_head(BackwardParams const& params, KeyTile const& tile, int g) {
        if constexpr (Config::kDropout) {
            batch_head_ = tile.batch * params.heads_q + tile.first_head + g;
        }
    }

    // Of kQueries queries of the sequence, from first_query on. By a whole warp.
    __device__ __forceinline__ void draw(BackwardParams const& params, SharedStorage<Config> const& shared,
                                         int first_query) {
        if constexpr (Config::kDropout) {
            int const lane = thread_number() % 32;
            int const g = lane / 4;
            int const first_key =
                read_again(shared.tile.n_block) * Config::kBlockN + thread_key<Config>() - g;
            PhiloxKey const key =
                PhiloxKey{read_again(shared.seed.low), read_again(shared.seed.high)}.uniform();
#pragma unroll
            for (int word = 0; word < kWords; ++word) {
                uint32_t drawn = 0;
#pragma unroll
                for (int byte = 2 * kRounds / kWords - 1; byte >= 0; --byte) {
                    int const query = 8 * (g % 4 + 4 * (2 * word + byte / 2)) + 2 * (lane % 4) + byte % 2;
                    uint32_t words[4];
                    philox(words, first_key / kKeysPerDraw + g / 4, first_query + query, batch_head_, key);
                    drawn = append_dropped(drawn, words, params.dropout.threshold);
                }
                dropped_[word] = 0;
#pragma unroll
                for (int from = 0; from < 8; ++from) {
                    uint32_t const given = __shfl_sync(0xffffffff, drawn, 4 * from + lane % 4);
                    dropped_[word] |= (given >> g & kFirstBits) << from;
                }
            }
        }
    }

    // x, or zero where the probability of accumulator `at` is dropped.
    __device__ __forceinline__ float keep(float x, int at) const {
        if constexpr (Config::kDropout) {
            int const eight = at / 4, r = at / 2 % 2, c = at % 2;
            int const bit = 8 * (2 * (eight / 4 % 2) + c) + eight % 4 + 4 * r;
            return dropped_[eight / 8] >> bit & 1 ? 0.0f : x;
        }
        return x;
    }

    // dP behind dropout: the gradient of the probability itself.
    __device__ __forceinline__ float gradient(BackwardParams const& params, float dp, int at) const {
        if constexpr (Config::kDropout) {
            return keep(dp, at) * params.dropout.keep_scale;
        }
        return dp;
    }

  private:
    // Behind `bits`, the eight of a draw, 1 where a key is dropped; the last is that of the first key.
    __device__ __forceinline__ static uint32_t append_dropped(uint32_t bits, uint32_t const (&words)[4],
                                                              uint32_t threshold) {
#pragma unroll
        for (int key = kKeysPerDraw - 1; key >= 0; --key) {
            uint32_t const value = key % 2 == 0 ? words[key / 2] & 0xffff : words[key / 2] >> 16;
            bits = __funnelshift_l(value - threshold, bits, 1);  // its sign
        }
        return bits;
    }

    uint32_t batch_head_;
    uint32_t dropped_[kWords];
};

}  // namespace flash8
