// The descales of a work tile, x ~ descale * x_fp8, as the mainloop needs them.
//
// Operands are not multiplied by them: Q's and K's join the softmax scale, V's joins the factor that rescales
// O from block to block. An invalid descale (clamp.cuh) turns the rows of every tile that reads it into NaN;
// it is detected before the mainloop.

#pragma once

#include "../arch/ptx.cuh"
#include "../clamp.cuh"
#include "pack_gqa.cuh"
#include "seqlen_info.cuh"

namespace flash8 {

// How many rows share a descale.
enum class ScaleGranularity { kNone, kHead, kBlock };

// The number of a packed sequence's first block of keys.
__device__ __forceinline__ int first_block(SeqlenInfo const& info, int batch) {
    return info.offset_k / kScaleBlock + batch;
}

// K's or V's descale of one head of one sequence: one value, or one per block of keys.
template <bool kBlocks>
class KeyDescale {
  public:
    __device__ KeyDescale(DescaleRef const& ref, SeqlenInfo const& info, bool packed, int batch, int head)
        : values_(ref.ptr), block_stride_(ref.block_stride) {
        if (values_ == nullptr) {
            return;
        }
        values_ += head * ref.head_stride;
        if constexpr (kBlocks) {
            values_ += packed ? first_block(info, batch) * ref.block_stride : info.batch_k * ref.batch_stride;
        } else {
            values_ += batch * ref.batch_stride;
        }
    }

    __device__ __forceinline__ float of(int n_block) const {
        if (values_ == nullptr) {
            return 1.0f;
        }
        return kBlocks ? __ldg(values_ + n_block * block_stride_) : __ldg(values_);
    }

    // The largest of KV blocks [begin, end), or NaN if one of them is invalid. By all lanes of a warp.
    __device__ float largest(int begin, int end) const {
        if (!kBlocks || values_ == nullptr) {
            return checked_descale(of(begin));
        }
        uint32_t bits = 0;  // ordered like the positive numbers that they are, NaN above all
        for (int n_block = begin + ptx::thread_index() % 32; n_block < end; n_block += 32) {
            bits = max(bits, __float_as_uint(checked_descale(of(n_block))));
        }
        return __uint_as_float(__reduce_max_sync(0xffffffff, bits));
    }

  private:
    float const* values_;
    int64_t block_stride_;
};

template <bool kBlocks, class Params>
__device__ float q_descale(Params const& params, SeqlenInfo const& info, int batch, QueryRow const& row) {
    DescaleRef const& ref = params.q_descale;
    int const query = min(row.query, info.seqlen_q - 1);  // rows past the end have no descale
    if (ref.ptr == nullptr || query < 0) {
        return 1.0f;
    }
    int const head = min(row.head, params.heads_q - 1) / params.heads_per_q_descale;
    float const* const values = ref.ptr + head * ref.head_stride;
    if constexpr (kBlocks) {
        bool const packed = params.sequences.cu_seqlens_q != nullptr;
        int const first = packed ? info.offset_q / kScaleBlock + batch : 0;
        return checked_descale(
            values[info.batch_q * ref.batch_stride + (first + query / kScaleBlock) * ref.block_stride]);
    } else {
        return checked_descale(values[batch * ref.batch_stride]);
    }
}

}  // namespace flash8
