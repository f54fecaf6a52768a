// Where one sequence's rows stand in Q, K, V and O, read once per work tile.

#pragma once

#include "params.h"

namespace flash8 {

struct SeqlenInfo {
    int batch_q;     // batch coordinate in Q and O: 0 when packed
    int batch_k;     // batch coordinate in K and V
    int offset_q;    // first row
    int offset_k;    // first used key, behind the left padding
    int seqlen_q;    // used rows
    int seqlen_k;    // used keys
    int capacity_q;  // rows that belong to the sequence: those not used are written as zero

    __device__ static SeqlenInfo read(SequenceParams const& sequences, int batch) {
        SeqlenInfo info;
        bool const packed_q = sequences.cu_seqlens_q != nullptr;
        bool const packed_k = sequences.cu_seqlens_k != nullptr;
        int const row = sequences.kv_batch_idx ? sequences.kv_batch_idx[batch] : batch;
        info.batch_q = packed_q ? 0 : batch;
        info.batch_k = packed_k ? 0 : row;
        info.offset_q = packed_q ? sequences.cu_seqlens_q[batch] : 0;
        info.offset_k = packed_k ? sequences.cu_seqlens_k[batch] : 0;
        info.capacity_q =
            packed_q ? sequences.cu_seqlens_q[batch + 1] - info.offset_q : sequences.max_seqlen_q;
        int const capacity_k =
            packed_k ? sequences.cu_seqlens_k[batch + 1] - info.offset_k : sequences.max_seqlen_k;
        int const leftpad = sequences.leftpad_k ? sequences.leftpad_k[batch] : 0;
        info.seqlen_q = sequences.seqused_q ? sequences.seqused_q[batch] : info.capacity_q;
        info.seqlen_k = (sequences.seqused_k ? sequences.seqused_k[batch] : capacity_k) - leftpad;
        info.offset_k += leftpad;
        return info;
    }
};

}  // namespace flash8
