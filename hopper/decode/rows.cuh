// The rows of Q of a unit: which query and head they are, their fragments, and how their scores scale.

#pragma once

#include "../clamp.cuh"
#include "key_scales.cuh"
#include "products.cuh"
#include "storage.cuh"

#include <cfloat>

namespace flash8 {

struct UnitRow {
    int query;
    int head;

    template <class Config>
    __device__ static UnitRow of(DecodeParams const& params, Segment const& segment, int row) {
        int const ratio = params.heads_q / params.heads_kv;
        int const all = segment.m_block * Config::kBlockM + row;
        int const query = all / ratio;
        return {query, segment.head * ratio + all - query * ratio};
    }
};

// A descale of (batch, head), or of the tensor; 1 where keys have their own.
template <class Config>
__device__ __forceinline__ float head_descale(DescaleRef const& ref, int scale_rows, Segment const& segment) {
    if (ref.ptr == nullptr || (Config::kKeyScales && scale_rows != 0)) {
        return 1.0f;
    }
    return checked_descale(ref.ptr[segment.batch * ref.batch_stride + segment.head * ref.head_stride]);
}

// What turns products with K into units of products with V. The two may be 2^24 apart: q and qv share a power
// of two per row, and farther apart one of them might lose its bits. Beyond that NaN tells.
__device__ __forceinline__ float checked_ratio(float k_descale, float v_descale) {
    float const ratio = k_descale / v_descale;
    return ratio >= 0x1p-24f && ratio <= 0x1p24f ? ratio : NAN;
}

// The product of three positive factors; NaN stays NaN. The smallest meets the largest first, so nothing
// overflows or vanishes on the way. It is a normal number: 0 times the -inf of a hidden key would be NaN, and
// with scales so small all scores are 0 as good as exactly. One that overflows is NaN: by infinity a row of
// negative scores would look like one without keys.
__device__ __forceinline__ float score_scale(float softmax_scale, float descale, float q_scale) {
    if (isnan(descale) || isnan(q_scale)) {
        return NAN;
    }
    float const low = fminf(softmax_scale, descale);
    float const high = fmaxf(softmax_scale, descale);
    float const middle = fmaxf(low, fminf(high, q_scale));
    float const product = fmaxf(fminf(low, q_scale) * fmaxf(high, q_scale) * middle, FLT_MIN);
    return product == INFINITY ? NAN : product;
}

// That of a row of an e4m3 Q. Blocks of a packed Q begin with their sequence; other granularities have
// strides of 0.
__device__ __forceinline__ float query_descale(DecodeParams const& params, SeqlenInfo const& info, int batch,
                                               UnitRow const& row) {
    DescaleRef const& ref = params.q_descale;
    if (ref.ptr == nullptr) {
        return 1.0f;
    }
    bool const packed = params.sequences.cu_seqlens_q != nullptr;
    int const first = packed ? info.offset_q / kScaleBlock + batch : 0;
    return checked_descale(
        ref.ptr[batch * ref.batch_stride + row.head / params.heads_per_q_descale * ref.head_stride +
                (first + row.query / kScaleBlock) * ref.block_stride]);
}

// Stages the fragments of Q in shared memory. One warp has eight rows, a lane a quarter of the channels of
// row `group`. bf16 rows become fp16 for e4m3 keys: a power of two per row brings their largest value to
// about 2^14, so none overflows, and values down to 2^-28 of it keep all their bits. e4m3 rows become fp16 as
// they are.
template <class Config>
class QueryStage {
  public:
    // By one warp per row tile; the others have nothing to do.
    __device__ static void fill(DecodeParams const& params, SharedStorage<Config>& shared,
                                Segment const& segment, SequenceWork<Config> const& sequence, int n) {
        SeqlenInfo const& info = sequence.info;
        int const lane = threadIdx.x % 32;
        int const row = 8 * n + lane / 4;
        UnitRow const at = UnitRow::of<Config>(params, segment, row);
        bool const exists = at.query < sequence.queries;
        auto const row_of = [&](TensorRef const& ref) {
            return static_cast<uint16_t const*>(ref.ptr) + info.batch_q * ref.batch_stride +
                   (info.offset_q + int64_t{exists ? at.query : 0}) * ref.row_stride +
                   (exists ? at.head : 0) * ref.head_stride;
        };
        bool const is_e4m3 = kMayBeE4m3 && params.q_is_e4m3 != 0;
        uint16_t const* const q = q_row(shared, row, row_of(params.q));
        uint2 fragments[Config::kChannelSteps];
        uint32_t largest = 0;  // magnitude, of bf16 as its bits
#pragma unroll
        for (int step = 0; step < Config::kChannelSteps; ++step) {
            uint32_t words[2];
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                int const channel = 16 * step + Products<Config>::q_channel(lane % 4, b);
                if (Config::kQv && step < kStepsOfQv) {
                    bool const reads = exists && channel < params.head_dim_v;
                    words[b] = reads ? *reinterpret_cast<uint32_t const*>(row_of(params.qv) + channel) : 0;
                } else {
                    int const of_q = channel - 16 * kStepsOfQv;
                    bool const reads = exists && of_q < params.head_dim;
                    words[b] = !reads    ? 0
                               : is_e4m3 ? e4m3_pair(params.q, info, exists ? at : UnitRow{0, 0}, of_q)
                                         : *reinterpret_cast<uint32_t const*>(q + of_q);
                }
                largest = max(largest, max(magnitude(words[b] & 0xffff), magnitude(words[b] >> 16)));
            }
            fragments[step] = make_uint2(words[0], words[1]);
        }
        float shift = mean_product(params, segment, fragments, is_e4m3);
        float scale = 1.0f;
        if (is_e4m3) {
            scale = exists ? query_descale(params, info, segment.batch, at) : 1.0f;
            shift *= scale;
        } else if constexpr (kNarrows) {
            largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 1));
            largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 2));
            // The exponent of the largest value, kept where powers of two and their inverses are normal.
            int const exponent = min(max(static_cast<int>(largest >> 7) - 127, -100), 126);
            scale = power_of_two(exponent - 14);
            float const inverse = power_of_two(14 - exponent);
#pragma unroll
            for (int step = 0; step < Config::kChannelSteps; ++step) {
                fragments[step] =
                    make_uint2(narrow(fragments[step].x, inverse), narrow(fragments[step].y, inverse));
            }
        }
#pragma unroll
        for (int step = 0; step < Config::kChannelSteps; ++step) {
            shared.q[n][step][lane] = fragments[step];
        }
        if (lane % 4 == 0) {
            float descale = head_descale<Config>(params.k_descale, params.k_scale_rows, segment);
            if constexpr (Config::kQv) {
                // All scores are in units of V's.
                float const of_v = head_descale<Config>(params.v_descale, params.v_scale_rows, segment);
                if (n == 0 && lane == 0) {
                    shared.key_factor = checked_ratio(descale, of_v);
                }
                descale = of_v;
            }
            shared.score_scale[row] = score_scale(
                params.scores.softmax_scale * (Config::kScoreMod ? 1.0f : kLog2E), descale, scale);
            shared.score_shift[row] = shift * params.scores.softmax_scale;
            if constexpr (Config::kScoreMod) {
                shared.slope[row] = exists ? slope(params.scores, segment.batch, at.head) : 0.0f;
                shared.own_key[row] = at.query + info.seqlen_k - info.seqlen_q + info.offset_k;
            }
        }
    }

  private:
    static constexpr bool kNarrows =
        Config::kArithmetic == ArithmeticType::kFp16 && Config::kElement == ElementChoice::kBf16;
    static constexpr bool kMayBeE4m3 = Config::kFp8 && !Config::kQv && !Config::kAppend;
    static constexpr int kStepsOfQv = Config::kQv ? Config::kHeadDimV / 16 : 0;

    // Where a row lies, which is `given` in global memory.
    __device__ __forceinline__ static uint16_t const* q_row(SharedStorage<Config> const& shared, int row,
                                                            uint16_t const* given) {
        if constexpr (Config::kAppend) {
            return shared.queries.of[row];
        } else {
            return given;
        }
    }

    // Two channels of a row of an e4m3 Q, in fp16.
    __device__ __forceinline__ static uint32_t e4m3_pair(TensorRef const& ref, SeqlenInfo const& info,
                                                         UnitRow const& at, int channel) {
        int64_t const row = info.batch_q * ref.batch_stride +
                            (info.offset_q + int64_t{at.query}) * ref.row_stride + at.head * ref.head_stride;
        uint32_t pair;
        uint32_t above;
        ptx::widen_e4m3(
            *reinterpret_cast<uint16_t const*>(static_cast<uint8_t const*>(ref.ptr) + row + channel), pair,
            above);
        return pair;
    }

    // The product of a row, before it is narrowed, and K's mean.
    __device__ static float mean_product(DecodeParams const& params, Segment const& segment,
                                         uint2 const (&fragments)[Config::kChannelSteps], bool is_fp16) {
        if (Config::kQv || params.k_mean.ptr == nullptr) {
            return 0.0f;
        }
        float const* const mean = params.k_mean.ptr + segment.batch * params.k_mean.batch_stride +
                                  segment.head * params.k_mean.head_stride;
        float product = 0.0f;
#pragma unroll
        for (int step = 0; step < Config::kChannelSteps; ++step) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                int const channel = 16 * step + Products<Config>::q_channel(threadIdx.x % 4, b);
                if (channel < params.head_dim) {
                    float2 const q = widened(b == 0 ? fragments[step].x : fragments[step].y, is_fp16);
                    product += q.x * mean[channel] + q.y * mean[channel + 1];
                }
            }
        }
        product += __shfl_xor_sync(0xffffffff, product, 1);
        return product + __shfl_xor_sync(0xffffffff, product, 2);
    }

    __device__ __forceinline__ static float2 widened(uint32_t pair, bool is_fp16) {
        if (Config::kElement == ElementChoice::kFp16 || is_fp16) {
            return ptx::widen_fp16(pair);
        }
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    }

    __device__ static float slope(ScoreParams const& scores, int batch, int head) {
        return scores.alibi_slopes == nullptr ? 0.0f
                                              : scores.alibi_slopes[batch * scores.alibi_batch_stride + head];
    }

    // Infinity and NaN do not count.
    __device__ __forceinline__ static uint32_t magnitude(uint32_t bits) {
        uint32_t const size = bits & 0x7fff;
        return size < 0x7f80 ? size : 0;
    }

    __device__ __forceinline__ static float power_of_two(int exponent) {
        return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
    }

    __device__ __forceinline__ static uint32_t narrow(uint32_t pair, float factor) {
        return ptx::pack_pair<ArithmeticType::kFp16>(__uint_as_float(pair << 16) * factor,
                                                     __uint_as_float(pair & 0xffff0000) * factor);
    }
};

// The factors of this lane's rows, two for each row tile. With kScoreMod registers are for the slopes'
// distances, and the factors are read from shared memory when the scores are modified.
template <class Config>
struct RowScales {
    float scale[Config::kScoreMod ? 1 : Config::kRowTiles][2];

    __device__ void read(SharedStorage<Config> const& shared) {
        if constexpr (!Config::kScoreMod) {
#pragma unroll
            for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    scale[n][r] = shared.score_scale[8 * n + 2 * (threadIdx.x % 4) + r];
                }
            }
        }
    }
};

}  // namespace flash8
