// Where the rows of one sequence are in Q, K, V and O, read once per work tile.

#pragma once

#include "../clamp.cuh"
#include "params.h"

namespace flash8 {

struct SeqlenInfo {
    int batch_q;   // batch coordinate in Q and O: 0 when packed
    int batch_k;   // batch coordinate in K and V
    int offset_q;  // first row
    int offset_k;  // first used key, after the left padding
    int seqlen_q;  // used rows
    int seqlen_k;  // used keys
    int rows_q;    // rows that belong to the sequence: unused ones are written as zero

    // offset_q: where the tile scheduler has found the first row of the sequence (WorkTile). new_keys: how
    // many there are behind seqused_k, which 32 bits count.
    __device__ static SeqlenInfo read(SequenceParams const& sequences, int batch, int offset_q,
                                      unsigned new_keys = 0) {
        SeqlenInfo info;
        bool const packed_q = sequences.cu_seqlens_q != nullptr;
        bool const packed_k = sequences.cu_seqlens_k != nullptr;
        int const total_q = static_cast<int>(sequences.total_q);
        info.batch_q = packed_q ? 0 : batch;
        info.offset_q = offset_q;
        info.rows_q = packed_q ? clamped(sequences.cu_seqlens_q[batch + 1], offset_q, total_q) - offset_q
                               : sequences.max_seqlen_q;

        int const row = sequences.kv_batch_idx ? sequences.kv_batch_idx[batch] : batch;
        bool const exists = packed_k || (row >= 0 && row < sequences.batch_k);  // -1: nothing to do
        info.seqlen_q = exists ? used(sequences.seqused_q, batch, info.rows_q, info.rows_q) : 0;
        RowRange const keys = packed_k ? packed_rows(sequences.cu_seqlens_k, batch, sequences.total_k)
                                       : RowRange{0, exists ? sequences.max_seqlen_k : 0};
        int const end = used(sequences.seqused_k, batch, keys.size(), keys.size(), new_keys);
        int const leftpad = used(sequences.leftpad_k, batch, end, 0);
        info.batch_k = packed_k || !exists ? 0 : row;
        info.offset_k = keys.begin + leftpad;
        info.seqlen_k = end - leftpad;
        return info;
    }

  private:
    __device__ static int used(int32_t const* lengths, int batch, int capacity, int otherwise,
                               unsigned more = 0) {
        return lengths ? clamped(static_cast<int>(lengths[batch] + more), 0, capacity) : otherwise;
    }
};

}  // namespace flash8
