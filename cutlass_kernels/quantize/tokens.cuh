// Which tokens of which sequence and head a CTA has.

#pragma once

#include "clamp.cuh"
#include "config.cuh"
#include "packed_block.cuh"

namespace flash8::quantize {

static_assert(Config::kTokens == kScaleBlock, "a tile is a block of the descales");

__device__ __forceinline__ PackedOffsets offsets_of(QuantizeParams const& params) {
    return {params.cu_seqlens, params.batch, static_cast<int>(params.total)};
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
    __device__ void find_packed(QuantizeParams const& params, int packed_block) {
        PackedBlock const found = PackedBlock::find(offsets_of(params), packed_block);
        batch = found.batch;
        block = packed_block;
        offset = found.offset;
        first = found.first;
        capacity = found.capacity;
        counted = found.counted;
    }
};

}  // namespace flash8::quantize
