// The one parameter of the GEMM kernel, shared by host and device by the rules of hopper/params.h.
//
//     out = round(scale_a * scale_b * (A B^T) + bias)
//     out = round(scale_result * (scale_a * scale_b * (A B^T) + bias))    e4m3, saturated at 448
//
// A (m, k) and B (n, k) are e4m3, both contiguous along k. B is the transpose of what users call mat2.
//
// Grouped: rows of A, and so of out, belong to groups, and group g has B[g] (n, k) and the scales of it.
// Grouped along k: out is (groups, m, n), and out[g] = A B^T over the part of k that group g has.

#pragma once

#include "params.h"

namespace flash8 {

// The map of B has this many dimensions in a kernel that knows groups, (k, n, 1, 1, groups); else 4.
inline constexpr std::uint32_t kGroupedRank = 5;

// fp32 scales of the rows of an operand. A row stride of zero is one scale for the tensor.
struct ScaleRef {
    const float* ptr;
    std::int64_t row_stride;    // between rows, or between blocks of rows
    std::int64_t block_stride;  // between blocks of 128 of k; unused without blocks
};

struct GemmParams {
    TensorMap tma_a;
    TensorMap tma_b;

    const void* a;     // (m, k)
    const void* b;     // (n, k)
    void* out;         // (m, n), contiguous along n
    const void* bias;  // (n), contiguous; null: none
    std::int64_t a_stride;
    std::int64_t b_stride;
    std::int64_t out_stride;
    ScaleRef scale_a;
    ScaleRef scale_b;           // of blocks: 128 rows of B share one
    const float* scale_result;  // of an e4m3 out; null: 1

    std::int32_t m;
    std::int32_t n;
    std::int32_t k;
    ElementType out_type;   // kBfloat16, kFloat16, kFloat32; kUint8: e4m3
    ElementType bias_type;  // kBfloat16, kFloat16, kFloat32
    // With blocks: 0, every row of A has its scales; 7, 128 rows share them.
    std::int32_t scale_a_row_shift;
    // Blocks of kBlockM rows, times the CTAs of a cluster that shares B, and of kBlockN columns of out. The
    // persistent CTAs walk bands of `band` blocks of rows, each column by column, so that A and B are read
    // while they are in L2.
    std::int32_t m_blocks;
    std::int32_t n_blocks;
    std::int32_t band;
    std::int32_t vector_stores;  // 1: rows of out are written by 16 bytes

    // Zero without groups. Groups lie one after another: group_rows[g] is where the rows of group g end. Or
    // they are rows_per_group rows apart, m in all: then group_rows[g] is how many group g has. Along k,
    // group_rows[g] is where the part of group g ends. The device clamps them all.
    const std::int32_t* group_rows;  // (groups)
    std::int64_t b_group_stride;     // from B[g] to B[g + 1]
    // Scales of row r of A, counted over all groups, are those at r * row_stride + g * scale_a_group_stride.
    // Along k, scales of blocks are those of all of k, and the groups' strides are zero with them.
    std::int64_t scale_a_group_stride;
    std::int64_t scale_b_group_stride;
    std::int32_t groups;
    std::int32_t rows_per_group;  // 0: one after another

    // 2, 4 or 8: as many CTAs of a cluster share the K of a tile, each a range of its blocks of 128, and add
    // up what they have in the order of their ranks. 0 and 1: one CTA has all of K.
    std::int32_t splits;
    std::int32_t reserved[15];
};

static_assert(kIsPlain<GemmParams> && alignof(GemmParams) == 64);
static_assert(sizeof(GemmParams) <= 4096);

}  // namespace flash8
