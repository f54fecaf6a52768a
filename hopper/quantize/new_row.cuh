// What becomes of a new row of Q, K or V before it is stored: norm, position, mean, scale and cast. A thread
// has eight channels of it.
//
// Nothing passes between threads: a pair of channels that lie apart is turned by the two threads that have
// them, each of which loads both, and for a norm each loads the whole row.

#pragma once

#include "arithmetic.cuh"
#include "elements.cuh"
#include "new_token.cuh"

namespace flash8::quantize {

// Eight neighbouring channels as they lie in memory.
template <Input kInput>
struct Group {
    static constexpr int kBytes = kInput == Input::kE4m3 ? 1 : kInput == Input::kFp32 ? 4 : 2;
    static constexpr int kWords = kGroup * kBytes / 4;

    uint32_t words[kWords];

    __device__ static Group load(TensorRef const& x, int64_t element) {
        char const* const source = static_cast<char const*>(x.ptr) + element * kBytes;
        Group group;
#pragma unroll
        for (int i = 0; i < kWords; i += 2) {
            if constexpr (kWords == 2) {
                uint2 const raw = *reinterpret_cast<uint2 const*>(source);
                group.words[0] = raw.x, group.words[1] = raw.y;
            } else if (i % 4 == 0) {
                uint4 const raw = *reinterpret_cast<uint4 const*>(source + 4 * i);
                group.words[i] = raw.x, group.words[i + 1] = raw.y;
                group.words[i + 2] = raw.z, group.words[i + 3] = raw.w;
            }
        }
        return group;
    }

    __device__ void store(TensorRef const& out, int64_t element) const {
        char* const target = static_cast<char*>(out.ptr) + element * kBytes;
#pragma unroll
        for (int i = 0; i < kWords; i += 2) {
            if constexpr (kWords == 2) {
                *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
            } else if (i % 4 == 0) {
                *reinterpret_cast<uint4*>(target + 4 * i) =
                    make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
            }
        }
    }

    __device__ void widen_into(float (&values)[kGroup]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (kInput == Input::kFp32) {
                values[i] = __uint_as_float(words[i]);
            } else {
                values[2 * i] = widen<kInput>(words[i] & 0xffff);
                values[2 * i + 1] = widen<kInput>(words[i] >> 16);
            }
        }
    }

    __device__ void narrow_from(float const (&values)[kGroup]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (kInput == Input::kFp32) {
                words[i] = __float_as_uint(values[i]);
            } else {
                words[i] = narrow<kInput>(values[2 * i], values[2 * i + 1]);
            }
        }
    }
};

// kCount neighbouring entries of a table in fp32 or in x's type; kCount is 4 or 8.
template <Input kInput, int kCount>
__device__ __forceinline__ void load_table(bool is_fp32, void const* table, int64_t entry,
                                           float (&values)[kCount]) {
    if (kInput == Input::kFp32 || is_fp32) {
        float const* const source = static_cast<float const*>(table) + entry;
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            float4 const raw = *reinterpret_cast<float4 const*>(source + i);
            values[i] = raw.x, values[i + 1] = raw.y, values[i + 2] = raw.z, values[i + 3] = raw.w;
        }
    } else {
        uint16_t const* const source = static_cast<uint16_t const*>(table) + entry;
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            uint2 const raw = *reinterpret_cast<uint2 const*>(source + i);
            values[i] = widen<kInput>(raw.x & 0xffff);
            values[i + 1] = widen<kInput>(raw.x >> 16);
            values[i + 2] = widen<kInput>(raw.y & 0xffff);
            values[i + 3] = widen<kInput>(raw.y >> 16);
        }
    }
}

// RMSNorm of a row, which begins at `element`. The sum is of every eighth channel in turn, then by pairs.
template <Input kInput>
class RowNorm {
  public:
    __device__ RowNorm(AppendedRows const& rows, int64_t element) : rows_(rows) {
        if (!exists()) {
            return;
        }
        float sums[kGroup] = {};
#pragma unroll 2
        for (int channel = 0; channel < rows.head_dim; channel += kGroup) {
            float x[kGroup];
            Group<kInput>::load(rows.x, element + channel).widen_into(x);
#pragma unroll
            for (int c = 0; c < kGroup; ++c) {
                sums[c] = add(sums[c], multiply(x[c], x[c]));
            }
        }
#pragma unroll
        for (int count = kGroup / 2; count > 0; count /= 2) {
#pragma unroll
            for (int c = 0; c < count; ++c) {
                sums[c] = add(sums[2 * c], sums[2 * c + 1]);
            }
        }
        float const mean = multiply(sums[0], reciprocal(static_cast<float>(rows.head_dim)));
        inverse_ = reciprocal(square_root(add(mean, rows.norm_eps)));
    }

    __device__ bool exists() const { return rows_.norm_weight != nullptr; }

    // Of eight channels from `channel` on.
    __device__ __forceinline__ void apply(int channel, float (&y)[kGroup]) const {
        if (!exists()) {
            return;
        }
        float weight[kGroup];
        load_table<kInput>(rows_.norm_is_fp32, rows_.norm_weight, channel, weight);
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
            y[c] = multiply(multiply(y[c], inverse_), weight[c]);
        }
    }

  private:
    AppendedRows const& rows_;
    float inverse_ = 1.0f;
};

// (first, second) becomes (first cos - second sin, first sin + second cos). `element` is that of channel 0.
template <Input kInput>
__device__ __forceinline__ void turn(RotaryParams const& rotary, TensorRef const& x,
                                     RowNorm<kInput> const& norm, int64_t element, int channel,
                                     int64_t position, float (&y)[kGroup]) {
    if (rotary.interleaved) {
        constexpr int kPairs = kGroup / 2;
        float cos[kPairs];
        float sin[kPairs];
        load_table<kInput>(rotary.is_fp32, rotary.cos, position * rotary.cos_stride + channel / 2, cos);
        load_table<kInput>(rotary.is_fp32, rotary.sin, position * rotary.sin_stride + channel / 2, sin);
#pragma unroll
        for (int c = 0; c < kPairs; ++c) {
            float const first = y[2 * c];
            float const second = y[2 * c + 1];
            y[2 * c] = subtract(multiply(first, cos[c]), multiply(second, sin[c]));
            y[2 * c + 1] = add(multiply(first, sin[c]), multiply(second, cos[c]));
        }
        return;
    }
    int const half = rotary.rotary_dim / 2;
    bool const first = channel < half;
    int const entry = first ? channel : channel - half;
    int const other_channel = first ? channel + half : entry;
    float other[kGroup];
    Group<kInput>::load(x, element + other_channel).widen_into(other);
    norm.apply(other_channel, other);
    float cos[kGroup];
    float sin[kGroup];
    load_table<kInput>(rotary.is_fp32, rotary.cos, position * rotary.cos_stride + entry, cos);
    load_table<kInput>(rotary.is_fp32, rotary.sin, position * rotary.sin_stride + entry, sin);
    // Times -1 is exact: the first half is y cos + (-other) sin.
    float const sign = first ? -1.0f : 1.0f;
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
        y[c] = multiply_add(multiply(other[c], sin[c]), sign, multiply(y[c], cos[c]));
    }
}

// Normalises and rotates eight channels from `channel` on of the row that begins at `element`. `group` has
// them as they lie in memory, and then as its type has the result; y is the result in fp32.
template <Input kInput>
__device__ __forceinline__ void normalise_and_turn(RotaryParams const& rotary, AppendedRows const& rows,
                                                   NewToken const& token, int64_t element, int channel,
                                                   Group<kInput>& group, float (&y)[kGroup]) {
    group.widen_into(y);
    RowNorm<kInput> const norm(rows, element);
    norm.apply(channel, y);
    bool const turns = rows.rotates && channel < rotary.rotary_dim;
    if (turns) {
        turn(rotary, rows.x, norm, element, channel, position_of(rotary, rows, token), y);
    }
    if (turns || norm.exists()) {
        group.narrow_from(y);
    }
}

__device__ __forceinline__ float inverse_descale(AppendedRows const& rows, int head, NewToken const& token,
                                                 Place const& place) {
    DescaleRef const& ref = rows.descale;
    if (ref.ptr == nullptr) {
        return 1.0f;
    }
    int const batch = rows.descale_by_slot ? place.slot : token.batch;
    return reciprocal(checked_descale(
        ref.ptr[batch * ref.batch_stride + head * ref.head_stride + place.block * ref.block_stride]));
}

// Eight channels in e4m3.
__device__ __forceinline__ uint2 quantized(AppendedRows const& rows, int head, int channel,
                                           NewToken const& token, Place const& place, float (&y)[kGroup]) {
    if (rows.mean.ptr != nullptr) {
        float mean[kGroup];
        load_floats(
            rows.mean.ptr + token.batch * rows.mean.batch_stride + head * rows.mean.head_stride + channel,
            mean);
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
            y[c] = subtract(y[c], mean[c]);
        }
    }
    float const inverse = inverse_descale(rows, head, token, place);
#pragma unroll
    for (int c = 0; c < kGroup; ++c) {
        y[c] = multiply(y[c], inverse);
    }
    return make_uint2(pack<false>(y[0], y[1], y[2], y[3]), pack<false>(y[4], y[5], y[6], y[7]));
}

}  // namespace flash8::quantize
