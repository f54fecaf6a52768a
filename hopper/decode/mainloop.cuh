// What one warp does with its tiles of a segment, where O fits its registers.

#pragma once

#include "ring.cuh"
#include "softmax.cuh"

#include <type_traits>

namespace flash8 {

template <class Config>
class Mainloop {
    using Product = Products<Config>;
    using Softmax = RowTileSoftmax<Config>;
    static constexpr int kRowTiles = Config::kRowTiles;
    static constexpr int kKeySteps = Config::kKeySteps;

  public:
    __device__ Mainloop(DecodeParams const& params, SharedStorage<Config>& shared, Share const& share,
                        int warp)
        : params_(params),
          shared_(shared),
          ring_(params, shared, share, warp),
          key_scales_(shared, warp),
          warp_(warp) {}

    // The tiles of a segment that this warp has. Q is in shared memory.
    __device__ void run(Walk<Config> const& walk, Accumulators<Config>& sums) {
        sums.clear();
        key_scales_.clear();
        Segment const& segment = walk.segment;
        SequenceWork<Config> const& sequence = walk.sequence;
        KeyRange const tiles = segment.of_team<Config>(warp_);
        if (tiles.begin == tiles.end) {
            return;
        }
        RowScales<Config> scales;
        scales.read(shared_);
        if constexpr (Config::kQInRegisters) {
            read_queries();
        }
        int const common_begin = sequence.common_begin;
        int const common_end = sequence.common_end;
        int const first = sequence.first_tile();
#pragma unroll 1
        for (int tile = first + tiles.begin; tile < first + tiles.end; ++tile) {
            int const position = tile * Config::kBlockN;
            bool const edge = position < common_begin || position + Config::kBlockN > common_end;
            typename Product::Scores s;
            ring_.template wait<Config::kKeyScales>();
            if constexpr (Config::kAppend) {
                if (edge) {
                    ring_.patch(params_, walk, position);
                }
            }
            Product::template scores<false, false>(s, ring_.address(),
                                                   [&](int step, int n) { return query(step, n); });
            ring_.template release<false>();
            float change_of_unit = 1.0f;
            if constexpr (Config::kKeyScales) {
                change_of_unit = key_scales_.enter();
                key_scales_.each_k([&](int i, int h, float descale) { scale_keys(s, i, h, descale); });
            }
            if constexpr (Config::kScoreMod) {
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) {
                    Softmax::modify(params_, shared_, n, position, scores_of(s, n));
                }
            }
            if (edge) {
                typename Config::TileMask const mask(params_, sequence.info);
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) {
                    Softmax::mask(params_, mask, segment, sequence, n, position, scores_of(s, n));
                }
            }
            typename Product::Weights p;
            weigh(s, p, scales, change_of_unit, sums);
            ring_.wait();
            if (edge) {
                ring_.clear_hidden(sequence, position);
            }
            Product::out(sums.o, ring_.address(), p);
            ring_.template release<true>();
        }
        if constexpr (Config::kKeyScales) {
            sums.unit = key_scales_.unit();
        }
    }

  private:
    __device__ void read_queries() {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int step = 0; step < Config::kChannelSteps; ++step) {
                queries_[n][step] = shared_.q[n][step][threadIdx.x % 32];
            }
        }
    }

    __device__ __forceinline__ uint2 query(int step, int n) const {
        if constexpr (Config::kQInRegisters) {
            return queries_[n][step];
        } else {
            return shared_.q[n][step][threadIdx.x % 32];
        }
    }

    __device__ __forceinline__ static auto scores_of(typename Product::Scores& s, int n) {
        return [&s, n](int i, int c) -> float& { return s[i][n][c]; };
    }

    // Turns scores into P, which becomes the second operand of the next product.
    __device__ __forceinline__ void weigh(typename Product::Scores& s, typename Product::Weights& p,
                                          RowScales<Config> const& scales, float change_of_unit,
                                          Accumulators<Config>& sums) {
        float alpha[kRowTiles][2];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            auto const score = scores_of(s, n);
            Softmax::exponentiate(scales.scale[Config::kScoreMod ? 0 : n], sums.reference[n], sums.sum[n],
                                  alpha[n], score);
            if constexpr (!Config::kKeyScales) {
                finish_weights(s, p, n, alpha[n], sums);
            }
        }
        if constexpr (Config::kKeyScales) {
            key_scales_.each_v([&](int i, int h, float descale) { scale_keys(s, i, h, descale); });
            key_scales_.leave();
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
                alpha[n][0] *= change_of_unit;
                alpha[n][1] *= change_of_unit;
                finish_weights(s, p, n, alpha[n], sums);
            }
        }
    }

    __device__ __forceinline__ static void finish_weights(typename Product::Scores& s,
                                                          typename Product::Weights& p, int n,
                                                          float const (&alpha)[2],
                                                          Accumulators<Config>& sums) {
#pragma unroll
        for (int i = 0; i < kKeySteps; ++i) {
            p[i][n] = Softmax::fragment(i, scores_of(s, n));
        }
        sums.rescale(n, alpha);
    }

    // Of half `h` of step i of the keys, in all rows.
    __device__ __forceinline__ static void scale_keys(typename Product::Scores& s, int i, int h,
                                                      float descale) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            s[i][n][2 * h] *= descale;
            s[i][n][2 * h + 1] *= descale;
        }
    }

    DecodeParams const& params_;
    SharedStorage<Config>& shared_;
    Ring<Config> ring_;
    std::conditional_t<Config::kKeyScales, KeyScales<Config>, NoKeyScales> key_scales_;
    int warp_;
    typename Product::Queries queries_;
};

}  // namespace flash8
