// The walk over tiles of the QKV projection: a tile is 128 tokens of one head of q, k or v, the block that
// has a descale. Blocks start with their sequence, so that a tile has tokens of one sequence only.

#pragma once

#include "../quantize/packed_block.cuh"
#include "qkv_params.h"
#include "tile.cuh"

namespace flash8::gemm {

struct TokenBlock {
    int head;      // over those of q, k and v
    int batch;     // the sequence
    int block;     // of the descale: within the sequence when dense, over all sequences when packed
    int offset;    // row of A of the sequence's first token
    int first;     // token within the sequence
    int capacity;  // tokens to write: the sequence's, and with the last packed one all rows past it
    int counted;   // tokens that count for amax; all others of column-major V are zeros

    __device__ bool empty() const { return first >= capacity; }
};

// Static and persistent, as the GEMM's. Every role of the CTA walks the same blocks in the same order.
class TokenBlockWalk {
  public:
    __device__ explicit TokenBlockWalk(QkvParams const& params)
        : params_(params),
          index_(static_cast<int>(blockIdx.x)),
          count_(params.gemm.m_blocks * params.gemm.n_blocks) {}

    __device__ __forceinline__ bool next(TokenBlock& found) {
        if (index_ >= count_) {
            return false;
        }
        Tile const tile = tile_in_bands(params_.gemm, index_, params_.gemm.m_blocks);
        found = block_of(tile.m0 / Config::kBlockM);
        found.head = tile.n0 / Config::kBlockN;
        if (params_.seqused != nullptr) {
            found.counted = clamped(params_.seqused[found.batch], 0, found.counted);
        }
        index_ += static_cast<int>(gridDim.x);
        return true;
    }

  private:
    __device__ __forceinline__ TokenBlock block_of(int block) const {
        if (params_.cu_seqlens != nullptr) {
            quantize::PackedOffsets const offsets = {params_.cu_seqlens, params_.batch, params_.gemm.m};
            quantize::PackedBlock const found = quantize::PackedBlock::find(offsets, block);
            return {0, found.batch, block, found.offset, found.first, found.capacity, found.counted};
        }
        int const seqlen = params_.seqlen;
        int const blocks = (seqlen + kScaleBlock - 1) / kScaleBlock;
        int const batch = block / blocks;
        int const own = block - batch * blocks;
        return {0, batch, own, batch * seqlen, own * kScaleBlock, seqlen, seqlen};
    }

    QkvParams const& params_;
    int index_;  // the next tile; the host keeps count + gridDim.x below 2^31
    int count_;
};

// The same blocks as tiles of the product, for who loads: those without a token are passed over.
class LoadedTileWalk {
  public:
    __device__ explicit LoadedTileWalk(QkvParams const& params) : blocks_(params) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        TokenBlock block;
        do {
            if (!blocks_.next(block)) {
                return false;
            }
        } while (block.empty());
        tile = {block.offset + block.first, block.head * Config::kBlockN, block.offset + block.capacity, 0};
        return true;
    }

  private:
    TokenBlockWalk blocks_;
};

}  // namespace flash8::gemm
