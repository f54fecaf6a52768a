// Index values that only the device sees (cu_seqlens, used lengths, rows of the cache) are clamped where they
// are read. They may still be wrong, but they never address anything outside a tensor.

#pragma once

#include <cstdint>

namespace flash8 {

__device__ __forceinline__ int clamped(int value, int least, int most) {
    return max(least, min(value, most));
}

// Rows [begin, end).
struct RowRange {
    int begin;
    int end;

    __device__ int size() const { return end - begin; }
};

// The rows of a packed sequence: its start is in [0, total], its end in [start, total]. Offsets that decrease
// may make sequences overlap, which is harmless where rows are only read.
__device__ __forceinline__ RowRange packed_rows(int32_t const* cu_seqlens, int sequence, int64_t total) {
    int const rows = static_cast<int>(total);
    int const begin = clamped(cu_seqlens[sequence], 0, rows);
    return {begin, clamped(cu_seqlens[sequence + 1], begin, rows)};
}

// A valid descale is positive, from 2^-126, the smallest normal number, to 2^126, whose inverse is normal
// too. Any other one counts as NaN, so that the results show that it is wrong.
__device__ __forceinline__ float checked_descale(float descale) {
    constexpr uint32_t kSmallest = 0x00800000;
    constexpr uint32_t kLargest = 0x7e800000;
    bool const fits = __float_as_uint(descale) - kSmallest <= kLargest - kSmallest;
    return fits ? descale : __uint_as_float(0x7fffffff);
}

}  // namespace flash8
