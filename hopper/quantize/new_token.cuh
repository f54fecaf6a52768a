// Which token a thread has, and where in a cache it goes.

#pragma once

#include "../clamp.cuh"
#include "append_params.h"

namespace flash8::quantize {

// A token by its number in x: of a packed sequence that which begins last before it, as far as offsets
// ascend.
struct NewToken {
    int batch;
    int index;            // within the sequence
    bool exists;          // whether the sequence reaches it
    int64_t element;      // of x, at head 0 and channel 0
    int64_t out_element;  // of Q's output

    NewToken() = default;

    // What position_of has to know of one.
    __device__ static NewToken at(int batch, int index) {
        NewToken token{};
        token.batch = batch;
        token.index = index;
        token.exists = true;
        return token;
    }

    // How many a sequence has.
    __device__ static int count(AppendedRows const& rows, int batch) {
        return rows.cu_seqlens == nullptr ? rows.seqlen
                                          : packed_rows(rows.cu_seqlens, batch, rows.tokens).size();
    }

    // By its number within a sequence, where Q's output does not matter.
    __device__ static NewToken of_sequence(AppendedRows const& rows, int batch, int index) {
        NewToken token = at(batch, index);
        if (rows.cu_seqlens == nullptr) {
            token.exists = index < rows.seqlen;
            token.element = batch * rows.x.batch_stride + int64_t{index} * rows.x.row_stride;
        } else {
            RowRange const own = packed_rows(rows.cu_seqlens, batch, rows.tokens);
            token.exists = index < own.size();
            token.element = (int64_t{own.begin} + index) * rows.x.row_stride;
        }
        return token;
    }

    __device__ NewToken(AppendedRows const& rows, int sequences, int token) {
        if (rows.cu_seqlens == nullptr) {
            batch = token / rows.seqlen;
            index = token % rows.seqlen;
            exists = true;
            element = batch * rows.x.batch_stride + index * rows.x.row_stride;
            out_element = batch * rows.out.batch_stride + index * rows.out.row_stride;
            return;
        }
        int low = 0;
        int high = sequences - 1;
        while (low < high) {
            int const middle = (low + high + 1) / 2;
            if (rows.cu_seqlens[middle] <= token) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        RowRange const own = packed_rows(rows.cu_seqlens, low, rows.tokens);
        batch = low;
        index = token - own.begin;
        exists = index >= 0 && token < own.end;
        element = token * rows.x.row_stride;
        out_element = token * rows.out.row_stride;
    }
};

// The row of the rotary tables; the nearest one where there is none.
__device__ __forceinline__ int64_t position_of(RotaryParams const& rotary, AppendedRows const& rows,
                                               NewToken const& token) {
    int64_t const start = rotary.offsets != nullptr ? rotary.offsets[token.batch] : 0;
    int64_t const position = start + (rows.advances ? token.index : 0);
    return max(int64_t{0}, min(position, static_cast<int64_t>(rotary.positions) - 1));
}

struct Place {
    int slot;
    int row;    // within the slot
    int block;  // of the slot's descales
    bool exists;

    Place() = default;

    __device__ Place(PlaceParams const& params, NewToken const& token) {
        // No cache reaches the end of 32 bits.
        unsigned const farthest = 0x7fffffff;
        int const length = params.cache_seqlens[token.batch];
        unsigned const reached = static_cast<unsigned>(length) + token.index;
        int const position = length < 0 || reached >= farthest ? -1 : static_cast<int>(reached);
        int const line = params.kv_batch_idx != nullptr ? params.kv_batch_idx[token.batch] : token.batch;
        if (params.page_table != nullptr) {
            int const column = position / params.slot_tokens;
            bool const listed =
                position >= 0 && column < params.max_pages && line >= 0 && line < params.table_rows;
            slot = listed ? params.page_table[line * params.page_table_stride + column] : -1;
            row = position % params.slot_tokens;
            block = 0;
        } else {
            slot = line;
            row = position;
            block = position / kScaleBlock;
        }
        exists =
            token.exists && position >= 0 && slot >= 0 && slot < params.num_slots && row < params.slot_tokens;
    }
};

// How many new tokens a sequence says it has.
__device__ __forceinline__ unsigned count_of(AppendedRows const& keys, int64_t batch) {
    if (keys.cu_seqlens == nullptr) {
        return keys.seqlen;
    }
    return static_cast<unsigned>(keys.cu_seqlens[batch + 1]) - keys.cu_seqlens[batch];
}

// What attention takes for seqused_k. 32 bits wrap around, as torch's do.
__device__ __forceinline__ void write_lengths(AppendParams const& params, int threads) {
    int64_t const step = int64_t{gridDim.x} * threads;
    for (int64_t batch = int64_t{blockIdx.x} * threads + threadIdx.x; batch < params.batch; batch += step) {
        params.lengths[batch] =
            static_cast<int>(params.place.cache_seqlens[batch] + count_of(params.rows[1], batch));
    }
}

}  // namespace flash8::quantize
