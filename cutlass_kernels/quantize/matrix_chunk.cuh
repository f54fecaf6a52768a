// Sixteen neighbouring columns of a row as they lie in memory, read and written by 16 bytes or by elements.

#pragma once

#include "matrix_config.cuh"
#include "quantize/elements.cuh"

namespace flash8::quantize {

template <Input kType>
struct Chunk {
    static constexpr int kColumns = MatrixConfig::kColumns;
    static constexpr int kBytes = kType == Input::kFp32 ? 4 : 2;
    static constexpr int kVectors = kColumns * kBytes / 16;
    static constexpr int kPerVector = 16 / kBytes;

    uint32_t words[4 * kVectors];

    // `inside`: how many of the columns exist, which may be less than 0 or more than 16. Others get
    // `beyond`, a word of elements. One load per condition, which ptxas predicates: no load waits for
    // another.
    __device__ __forceinline__ void load(bool vectors, void const* row, int column, int inside,
                                         uint32_t beyond = 0) {
        if (vectors) {
            uint4 const* const source =
                reinterpret_cast<uint4 const*>(static_cast<char const*>(row) + int64_t{column} * kBytes);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                uint4 raw = make_uint4(beyond, beyond, beyond, beyond);
                if (i * kPerVector < inside) {
                    raw = source[i];
                }
                words[4 * i] = raw.x, words[4 * i + 1] = raw.y;
                words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4 * kVectors; ++i) {
                words[i] = beyond;
            }
            load_elements(row, column, inside);
        }
    }

    __device__ __forceinline__ void store(bool vectors, void* row, int column, int inside) const {
        if (vectors) {
            uint4* const target =
                reinterpret_cast<uint4*>(static_cast<char*>(row) + int64_t{column} * kBytes);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                if (i * kPerVector < inside) {
                    target[i] =
                        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
                }
            }
        } else {
            store_elements(row, column, inside);
        }
    }

    __device__ __forceinline__ void widen_into(float (&values)[kColumns]) const {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if constexpr (kType == Input::kFp32) {
                values[i] = __uint_as_float(words[i]);
            } else {
                values[i] = widen<kType>(words[i / 2] >> i % 2 * 16 & 0xffff);
            }
        }
    }

    // Rounded to nearest even.
    __device__ __forceinline__ void narrow_from(float const (&values)[kColumns]) {
#pragma unroll
        for (int i = 0; i < 4 * kVectors; ++i) {
            if constexpr (kType == Input::kFp32) {
                words[i] = __float_as_uint(values[i]);
            } else {
                words[i] = narrow<kType>(values[2 * i], values[2 * i + 1]);
            }
        }
    }

  private:
    __device__ __forceinline__ void load_elements(void const* row, int column, int inside) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i >= inside) {
                continue;
            }
            if constexpr (kType == Input::kFp32) {
                words[i] = static_cast<uint32_t const*>(row)[int64_t{column} + i];
            } else {
                uint32_t const raw = static_cast<uint16_t const*>(row)[int64_t{column} + i];
                words[i / 2] = __byte_perm(words[i / 2], raw, i % 2 == 0 ? 0x3254 : 0x5410);
            }
        }
    }

    __device__ __forceinline__ void store_elements(void* row, int column, int inside) const {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i >= inside) {
                continue;
            }
            if constexpr (kType == Input::kFp32) {
                static_cast<uint32_t*>(row)[int64_t{column} + i] = words[i];
            } else {
                static_cast<uint16_t*>(row)[int64_t{column} + i] =
                    static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
            }
        }
    }
};

}  // namespace flash8::quantize
