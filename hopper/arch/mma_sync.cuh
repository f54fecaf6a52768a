// Matrix products of one warp on 16-bit operands in registers, and the moves that make these operands.
//
// Lane l is in group g = l / 4 at place t = l % 4. D (16 x 8) += A (16 x 16) B (16 x 8):
//   A  registers 0 to 3: rows g, g + 8, g, g + 8 of columns 2 t and 2 t + 1; of the last two 8 columns on
//   B  registers 0 and 1: rows 2 t and 2 t + 1 of column g; of the second 8 rows on
//   D  registers 0 to 3: columns 2 t and 2 t + 1 of row g, then of row g + 8

#pragma once

#include "copy_async.cuh"

#include <cstdint>

namespace flash8 {

enum class ArithmeticType { kFp16, kBf16 };

namespace ptx {

// d = a b + c.
template <ArithmeticType kType>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t const (&a)[4], uint2 const& b,
                                             float const (&c)[4]) {
    if constexpr (kType == ArithmeticType::kFp16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(c[0]), "f"(c[1]), "f"(c[2]),
              "f"(c[3]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(c[0]), "f"(c[1]), "f"(c[2]),
              "f"(c[3]));
    }
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the shared address of row l % 8 of matrix l / 8, and
// gets columns 2 t and 2 t + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// Transposes an 8 x 8 matrix that the warp holds.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t word) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}

// Four e4m3 values as two registers of fp16, exactly: the two low bytes, the two high ones.
__device__ __forceinline__ void widen_e4m3(uint32_t word, uint32_t& low, uint32_t& high) {
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}\n"
        : "=r"(low), "=r"(high)
        : "r"(word));
}

__device__ __forceinline__ float2 widen_fp16(uint32_t pair) {
    float2 values;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
}

// Two floats in one register, `low` in the low half, rounded to nearest even.
template <ArithmeticType kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t word;
    if constexpr (kType == ArithmeticType::kFp16) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

// Everything that this thread has seen happens before what sees the sum.
__device__ __forceinline__ int add_acquire_release(int* address, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(address), "r"(value)
                 : "memory");
    return before;
}

__device__ __forceinline__ void store_relaxed(int* address, int value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace ptx

}  // namespace flash8
