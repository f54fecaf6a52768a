// Dropout: which probabilities are kept is a function of seed, batch, head, row and column alone, bit for bit
// that of python/flash8/tensors/philox.py.
//
// One draw of Philox decides over eight neighbouring keys of one query: word w has keys 2 w and 2 w + 1, the
// low half first. A probability is kept where its half is at least DropoutParams::threshold.

#pragma once

#include "../arch/quad.cuh"
#include "../arch/wgmma.cuh"
#include "pack_gqa.cuh"
#include "params.h"

namespace flash8 {

constexpr int kKeysPerDraw = 8;

struct PhiloxKey {
    uint32_t low;
    uint32_t high;

    __device__ __forceinline__ static PhiloxKey read(DropoutParams const& dropout) {
        auto const seed = static_cast<uint64_t>(*dropout.seed);
        return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    }

    // The same. ptxas takes the result of a shuffle from one lane to be that of the whole warp, and so keeps
    // the keys of all rounds in uniform registers. By a whole warp.
    __device__ __forceinline__ PhiloxKey uniform() const {
        return {__shfl_sync(0xffffffff, low, 0), __shfl_sync(0xffffffff, high, 0)};
    }
};

// Philox4x32-7 of (draw, row, batch * heads + head, 0).
__device__ __forceinline__ void philox(uint32_t (&words)[4], uint32_t draw, uint32_t row, uint32_t batch_head,
                                       PhiloxKey key) {
    constexpr int kRounds = 7;
    words[0] = draw;
    words[1] = row;
    words[2] = batch_head;
    words[3] = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        uint64_t const even = uint64_t{0xD2511F53} * words[0];
        uint64_t const odd = uint64_t{0xCD9E8D57} * words[2];
        words[0] = static_cast<uint32_t>(odd >> 32) ^ words[1] ^ key.low;
        words[1] = static_cast<uint32_t>(odd);
        words[2] = static_cast<uint32_t>(even >> 32) ^ words[3] ^ key.high;
        words[3] = static_cast<uint32_t>(even);
        key.low += 0x9E3779B9;
        key.high += 0xBB67AE85;
    }
}

// The forward's. A quad shares two rows, eight apart, and a thread has two of every eight keys: word
// threadIdx.x % 4 of every draw. So each lane makes a quarter of the draws, those of row lane / 2 for every
// other eight keys, and they exchange words.
template <class Config>
class Dropout {
  public:
    // first_row: the first of this thread's two rows.
    template <class Params>
    __device__ Dropout(Params const& params, WorkTile const& tile, int first_row) {
        if constexpr (Config::kDropout) {
            QueryRow const row = query_row<Config::kPackGqa>(params, tile, first_row + 8 * (lane() / 2));
            row_ = row.query;
            batch_head_ = tile.batch * params.heads_q + row.head;
            key_ = PhiloxKey::read(params.dropout).uniform();
            threshold_ = params.dropout.threshold;
        }
    }

    // Sets the dropped ones of P of block n_block to zero. The row sum has taken them all.
    template <class Accumulator>
    __device__ __forceinline__ void apply(Accumulator& p, int n_block) const {
        if constexpr (Config::kDropout) {
            static_assert(Config::kBlockN % (2 * kKeysPerDraw) == 0, "a quad draws for two eights at once");
            auto rows = rows_of(p);
            uint32_t const first = n_block * (Config::kBlockN / kKeysPerDraw) + lane() % 2;
#pragma unroll
            for (int pair = 0; pair < Config::kBlockN / (2 * kKeysPerDraw); ++pair) {
                uint32_t words[4];
                philox(words, first + 2 * pair, row_, batch_head_, key_);
                transpose_quad(words, lane());
#pragma unroll
                for (int drawn_by = 0; drawn_by < 4; ++drawn_by) {
                    int const r = drawn_by / 2;
                    int const column = 2 * (2 * pair + drawn_by % 2);
                    uint32_t const low = words[drawn_by] & 0xffff;
                    uint32_t const high = words[drawn_by] >> 16;
                    rows(r, column) = low >= threshold_ ? rows(r, column) : 0.0f;
                    rows(r, column + 1) = high >= threshold_ ? rows(r, column + 1) : 0.0f;
                }
            }
        }
    }

  private:
    __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 4); }

    uint32_t row_;
    uint32_t batch_head_;
    PhiloxKey key_;
    uint32_t threshold_;
};

}  // namespace flash8
