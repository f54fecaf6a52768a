// K - c, with the same c for all keys of a head: softmax and all gradients but dQ stay what they are, since
//
//   S = scale * q.(k - c) + scale * q.c    so with LSE - scale * q.c in the place of LSE, P is the same
//   dQ = dS K = dS (K - c) + rowsum(dS) c  and rowsum(dS) is known: dLSE + D * (the sink's probability)
//
// Channels with a bias cost dQ its precision: rounded dS no longer adds up to what it should. Off with
// softcap, where S is no sum any more. c is the mean in the type of K, so that K - c is exact where the bias
// is large.

#pragma once

#include "../arch/convert.cuh"
#include "../arch/swizzled_tile.cuh"
#include "params.h"

namespace flash8 {

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
        auto const* const halves = reinterpret_cast<cutlass::half_t const*>(&word);
        return make_float2(static_cast<float>(halves[0]), static_cast<float>(halves[1]));
    } else {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
    }
}

// What is taken off the keys of one head, channel by channel; nothing without a mean.
template <class Element>
class KeyMean {
  public:
    __device__ __forceinline__ KeyMean(BackwardParams const& params, int batch, int head_kv)
        : mean_(params.k_mean.ptr + batch * params.k_mean.batch_stride + head_kv * params.k_mean.head_stride),
          head_dim_(params.head_dim),
          given_(params.k_mean.ptr != nullptr && params.scores.softcap == 0.0f) {}

    __device__ __forceinline__ bool given() const { return given_; }

    // Two channels, rounded to the type of K. The tiles may have more channels than K.
    __device__ __forceinline__ float2 at(int channel) const {
        if (!given_ || channel >= head_dim_) {
            return make_float2(0.0f, 0.0f);
        }
        return unpack<Element>(pack<Element>(mean_[channel], mean_[channel + 1]));
    }

  private:
    float const* mean_;
    int head_dim_;
    bool given_;
};

// Takes the mean off a tile of keys in shared memory. By kThreads threads.
template <class Element, int kRows, int kColumns, int kPanel, int kThreads>
__device__ __forceinline__ void subtract_mean(Element* tile, KeyMean<Element> const& mean, int thread) {
    constexpr int kEights = kColumns / 8;
#pragma unroll 1
    for (int i = thread; i < kRows * kEights; i += kThreads) {
        int const channel = i % kEights * 8;
        int const offset = SwizzledTile<kRows, kPanel * sizeof(Element)>::offset(i / kEights, 2 * channel);
        uint4* const keys = reinterpret_cast<uint4*>(reinterpret_cast<char*>(tile) + offset);
        auto const centred = [&](uint32_t word, int pair) {
            float2 const x = unpack<Element>(word);
            float2 const m = mean.at(channel + 2 * pair);
            return pack<Element>(x.x - m.x, x.y - m.y);
        };
        uint4 const old = *keys;
        *keys = make_uint4(centred(old.x, 0), centred(old.y, 1), centred(old.z, 2), centred(old.w, 3));
    }
}

}  // namespace flash8
