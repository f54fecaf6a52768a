// Which tokens of which sequence and head a CTA has.

#pragma once

#include "clamp.cuh"
#include "config.cuh"

namespace flash8::quantize {

// cu_seqlens[i], brought into range.
__device__ __forceinline__ int offset_of(QuantizeParams const& params, int i) {
    return clamped(params.cu_seqlens[i], 0, static_cast<int>(params.total));
}

// The first block of packed sequence `batch`, which starts at row `offset`. One past the last sequence it is
// the number of blocks at most.
__device__ __forceinline__ int first_block(int offset, int batch) {
    return offset / Config::kTokens + batch;
}

struct TokenTile {
    int batch;
    int head;
    int index;       // of the tile, over the whole grid's order
    int block;       // of the descale: within the sequence when dense, over all sequences when packed
    int first;       // token within the sequence
    int64_t offset;  // row of the sequence's first token; 0 when dense
    int capacity;    // tokens to write: the sequence's, and with the last sequence all rows past it
    int counted;     // tokens that count for amax and mean

    __device__ static TokenTile read(QuantizeParams const& params) {
        TokenTile tile;
        tile.index = params.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        tile.head = tile.index % params.heads;
        int const block = tile.index / params.heads;
        if (params.cu_seqlens != nullptr) {
            tile.find_packed(params, block);
        } else {
            int const blocks = max(1, (params.seqlen + Config::kTokens - 1) / Config::kTokens);
            tile.batch = block / blocks;
            tile.block = block % blocks;
            tile.first = tile.block * Config::kTokens;
            tile.offset = 0;
            tile.capacity = tile.counted = params.seqlen;
        }
        if (params.seqused != nullptr) {
            tile.counted = clamped(params.seqused[tile.batch], 0, tile.counted);
        }
        return tile;
    }

    __device__ bool empty() const { return first >= capacity; }

    // The batch coordinate of tensors.
    __device__ int64_t tensor_batch(QuantizeParams const& params) const {
        return params.cu_seqlens != nullptr ? 0 : batch;
    }

    __device__ int64_t group(QuantizeParams const& params, GroupRef const& ref) const {
        return batch * ref.batch_stride + head * ref.head_stride + block * ref.block_stride;
    }

  private:
    // A bisection for the last sequence whose first block is not past this one. It also gives the rows of
    // the sequence, from the offsets that it compares: the largest one at or before the sequence and the
    // smallest one after it. Those are the sequence's own two if the offsets never decrease. If they do,
    // still no row has two sequences: any two of them part at one of these offsets, where the rows of one
    // end at the latest and those of the other begin at the earliest.
    //
    // Rows past the last sequence are cast with it and do not count. Blocks before the first sequence, and
    // those that no sequence reaches because offsets decrease, are empty.
    __device__ void find_packed(QuantizeParams const& params, int packed_block) {
        int low = 0;
        int high = params.batch - 1;
        int begin = offset_of(params, 0);
        int end = static_cast<int>(params.total);
        int low_block = first_block(begin, 0);
        while (low < high) {
            int const middle = (low + high + 1) / 2;
            int const middle_begin = offset_of(params, middle);
            int const middle_block = first_block(middle_begin, middle);
            if (middle_block <= packed_block) {
                low = middle;
                low_block = middle_block;
                begin = max(begin, middle_begin);
            } else {
                high = middle - 1;
                end = min(end, middle_begin);
            }
        }
        batch = low;
        block = packed_block;
        offset = begin;
        first = max(packed_block - low_block, 0) * Config::kTokens;
        if (packed_block < low_block) {
            capacity = counted = 0;
            return;
        }
        bool const last = low + 1 == params.batch;
        capacity = max(end - begin, 0);
        counted = last ? max(offset_of(params, low + 1) - begin, 0) : capacity;
    }
};

}  // namespace flash8::quantize
