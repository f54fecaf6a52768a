// What the kernel knows of the queries of a block, beside Q and dO.

#pragma once

#include "../attention/seqlen_info.cuh"
#include "params.h"

namespace flash8 {

template <int kBlockM, bool kFp8>
struct RowStats {
    float lse[kBlockM];  // in log2 units, +inf where P is zero
    float d[kBlockM];    // rowsum(dO * O) - dLSE
};
template <int kBlockM>
struct RowStats<kBlockM, true> {
    float lse[kBlockM];  // of K as it is stored, without its mean
    float d[kBlockM];    // rowsum(dO * (O - mean(V))) - dLSE
    float q_descale[4];  // the same four times: bulk loads move 16 bytes at least
};

// What the workspace has of a block.
template <int kBlockM, bool kFp8>
struct BlockStats {
    RowStats<kBlockM, kFp8> rows;
};
template <int kBlockM>
struct BlockStats<kBlockM, true> {
    RowStats<kBlockM, true> rows;
    float ds_sum[kBlockM];  // rowsum(dS)
};

// What a query of the sequence has in LSE or its gradient.
__device__ inline float row_value(RowRef const& rows, SeqlenInfo const& info, int head, int query) {
    return rows.ptr[info.batch_q * rows.batch_stride + head * rows.head_stride + info.offset_q +
                    static_cast<int64_t>(query)];
}

// The first block of queries of a sequence in the workspace. Those of packed sequences do not overlap:
// rounding down cu_seqlens loses less than one block, and every sequence before this one adds one.
template <int kBlockM>
__device__ __forceinline__ int64_t first_query_block(BackwardParams const& params, int batch, int offset_q) {
    if (params.sequences.cu_seqlens_q != nullptr) {
        return offset_q / kBlockM + static_cast<int64_t>(batch);
    }
    return static_cast<int64_t>(batch) * params.scheduler.max_m_blocks;
}

}  // namespace flash8
