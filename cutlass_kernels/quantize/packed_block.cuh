// Which tokens of packed sequences a block has. Descales and column-major V count blocks over all sequences,
// and a sequence starts with a new block.

#pragma once

#include "clamp.cuh"
#include "params.h"

namespace flash8::quantize {

// The first block of packed sequence `batch`, which starts at row `offset`. One past the last sequence it is
// the number of blocks at most.
__device__ __forceinline__ int first_block(int offset, int batch) {
    return offset / kScaleBlock + batch;
}

// Offsets of sequences, brought into range.
struct PackedOffsets {
    int32_t const* cu_seqlens;  // (sequences + 1)
    int sequences;
    int total;  // rows of all of them

    __device__ __forceinline__ int operator[](int i) const { return clamped(cu_seqlens[i], 0, total); }
};

struct PackedBlock {
    int batch;
    int offset;    // row of the sequence's first token
    int first;     // token within the sequence
    int capacity;  // tokens to write: the sequence's, and with the last sequence all rows past it
    int counted;   // tokens that count for amax and mean

    // A bisection for the last sequence whose first block is not past this one. It also gives the rows of
    // the sequence, from the offsets that it compares: the largest one at or before the sequence and the
    // smallest one after it. Those are the sequence's own two if the offsets never decrease. If they do,
    // still no row has two sequences: any two of them part at one of these offsets, where the rows of one
    // end at the latest and those of the other begin at the earliest.
    //
    // Rows past the last sequence are cast with it and do not count. Blocks before the first sequence, and
    // those that no sequence reaches because offsets decrease, are empty.
    __device__ static PackedBlock find(PackedOffsets const& offsets, int block) {
        int low = 0;
        int high = offsets.sequences - 1;
        int begin = offsets[0];
        int end = offsets.total;
        int low_block = first_block(begin, 0);
        while (low < high) {
            int const middle = (low + high + 1) / 2;
            int const middle_begin = offsets[middle];
            int const middle_block = first_block(middle_begin, middle);
            if (middle_block <= block) {
                low = middle;
                low_block = middle_block;
                begin = max(begin, middle_begin);
            } else {
                high = middle - 1;
                end = min(end, middle_begin);
            }
        }
        int const first = max(block - low_block, 0) * kScaleBlock;
        if (block < low_block) {
            return {low, begin, first, 0, 0};
        }
        bool const last = low + 1 == offsets.sequences;
        int const capacity = max(end - begin, 0);
        return {low, begin, first, capacity, last ? max(offsets[low + 1] - begin, 0) : capacity};
    }
};

}  // namespace flash8::quantize
