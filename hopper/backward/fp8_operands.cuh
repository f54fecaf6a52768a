// From e4m3 to the 16-bit operands of all products but S.
//
//   S = scale * q.k  from Q and K as the forward had them, so that rows of P add up to 1. LSE is that of
//                    k + k_mean: preprocess takes scale * q.k_mean off it.
//   dK += dS^T Q     Q times its descale, once a call, by preprocess
//   dP = V dO^T      V without its descale, which is exact: dP is multiplied with it in fp32. v_mean is in
//                    dO * O and not in dP: preprocess takes dO.v_mean off D.
//   dQ = dS (K - c)  K times its descale without c, a mean of its own. dQ gets rowsum(dS) * (c + k_mean)
//   back.
//
// rowsum(dS) is known: dLSE + D * (the sink's probability). dS does not add up to it, since O comes from an
// FP8 product, and dQ would have the difference times K's bias. Softcap weighs dS, so that the sum is not
// known; there c is zero.

#pragma once

#include "../arch/convert.cuh"
#include "../attention/seqlen_info.cuh"
#include "params.h"

namespace flash8 {

// Where the descales of one side of a sequence are, x ~ descale * x_fp8: one per tensor, per head, or per
// kScaleBlock tokens. Every tile of the backward lies within one block. An invalid descale counts as NaN
// (clamp.cuh).
class Descales {
  public:
    __device__ Descales(bool packed, int batch, int offset)
        : batch_(batch), first_block_(packed ? offset / kScaleBlock + batch : 0), packed_(packed) {}

    // Of a row of the sequence; 1 without a tensor of descales.
    __device__ float descale(DescaleRef const& ref, int head, int row) const {
        if (ref.ptr == nullptr) {
            return 1.0f;
        }
        // Blocks of all packed sequences stand in one row.
        bool const in_one_row = packed_ && ref.block_stride != 0;
        int64_t const block = first_block_ + static_cast<int64_t>(row / kScaleBlock);
        int64_t const sequence = in_one_row ? 0 : batch_ * ref.batch_stride;
        return checked_descale(ref.ptr[sequence + head * ref.head_stride + block * ref.block_stride]);
    }

  private:
    int batch_;
    int first_block_;
    bool packed_;
};

struct KeySequence : Descales {
    __device__ KeySequence(BackwardParams const& params, int batch, int offset_k)
        : Descales(params.sequences.cu_seqlens_k != nullptr, batch, offset_k) {}
};

struct QuerySequence : Descales {
    __device__ QuerySequence(BackwardParams const& params, int batch, int offset_q)
        : Descales(params.sequences.cu_seqlens_q != nullptr, batch, offset_q) {}
};

// Sixteen values of a row.
__device__ __forceinline__ void unpack_e4m3(uint4 const& stored, float (&values)[16]) {
    unpack_e4m3(stored.x, values);
    unpack_e4m3(stored.y, values + 4);
    unpack_e4m3(stored.z, values + 8);
    unpack_e4m3(stored.w, values + 12);
}

// Sixteen values times a factor to a tile of 16-bit rows. offsets: bytes of their two halves in the tile.
template <class Element>
__device__ __forceinline__ void widen(float const (&values)[16], void* tile, int const (&offsets)[2],
                                      float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int const at = 8 * half + 2 * i;
            words[i] = pack<Element>(values[at] * factor, values[at + 1] * factor);
        }
        *reinterpret_cast<uint4*>(static_cast<char*>(tile) + offsets[half]) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

}  // namespace flash8
