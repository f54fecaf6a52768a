// Which tokens of which sequence and head a CTA has.

#pragma once

#include "clamp.cuh"
#include "config.cuh"

namespace flash8::quantize {

// The first block of a packed sequence, or behind the last one the number of blocks at most.
__device__ __forceinline__ int first_block(QuantizeParams const& params, int batch) {
    return clamped(params.cu_seqlens[batch], 0, static_cast<int>(params.total)) / Config::kTokens + batch;
}

struct TokenTile {
    int batch;
    int head;
    int index;       // of the tile, over the whole grid's order
    int block;       // of the descale: within the sequence when dense, over all sequences when packed
    int first;       // token within the sequence
    int64_t offset;  // row of the sequence's first token; 0 when dense
    int capacity;    // tokens to write: those of the sequence, and behind the last one those of nobody
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
    // The last sequence whose first block is not behind this one. Rows behind the last sequence are cast with
    // it and do not count. Offsets that decrease may leave blocks that no sequence reaches, and those that do
    // not start with 0 blocks before the first one: they are empty.
    __device__ void find_packed(QuantizeParams const& params, int packed_block) {
        int low = 0;
        int high = params.batch - 1;
        while (low < high) {
            int const middle = (low + high + 1) / 2;
            if (first_block(params, middle) <= packed_block) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        int const begin = begin_of(params, low);
        int const end = clamped(params.cu_seqlens[low + 1], begin, static_cast<int>(params.total));
        int const blocks_before = packed_block - first_block(params, low);
        batch = low;
        block = packed_block;
        first = max(blocks_before, 0) * Config::kTokens;
        offset = begin;
        counted = blocks_before < 0 ? 0 : end - begin;
        capacity = low + 1 == params.batch ? static_cast<int>(params.total) - begin : counted;
        capacity = blocks_before < 0 ? 0 : capacity;
    }

    // An offset that decreases counts as the largest before it, as in the forward kernel: no row is written
    // for two sequences. The threads look at the offsets before it side by side, so that one that does not
    // decrease costs few loads and a barrier. By all threads of the CTA.
    __device__ static int begin_of(QuantizeParams const& params, int sequence) {
        int const total = static_cast<int>(params.total);
        int const begin = clamped(params.cu_seqlens[sequence], 0, total);
        bool decreases = false;
        for (int i = threadIdx.x; i < sequence; i += Config::kThreads) {
            decreases |= params.cu_seqlens[i] > begin;
        }
        if (!__syncthreads_or(decreases)) {
            return begin;
        }
        int largest = begin;
        for (int i = threadIdx.x % 32; i < sequence; i += 32) {
            largest = max(largest, params.cu_seqlens[i]);
        }
        return min(__reduce_max_sync(0xffffffff, largest), total);
    }
};

}  // namespace flash8::quantize
