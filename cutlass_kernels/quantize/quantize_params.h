// The one parameter of the quantizer kernels, shared by host and device by the rules of hopper/params.h.
//
//     y    = rotate(position(x) - mean)         each step optional, in fp32
//     data = saturate(y * (1 / descale))        descale = amax / the largest value of the 8-bit type
//
// A tile is 128 tokens of one head. A packed sequence starts with a new tile: sequence b has blocks
// cu_seqlens[b] / 128 + b up to, not including, cu_seqlens[b + 1] / 128 + b + 1, at least one.

#pragma once

#include "params.h"

namespace flash8 {

// fp32 values by group of tokens: all strides zero is one value for the tensor, block_stride zero one for a
// head of a sequence. Packed blocks count over all sequences, with a batch stride of zero.
struct GroupRef {
    float* ptr;
    std::int64_t batch_stride;
    std::int64_t head_stride;
    std::int64_t block_stride;
};

// Where the descale of a tile comes from.
enum class ScaleSource : std::int32_t {
    kTile = 0,   // the amax of the tile itself
    kAmax = 1,   // QuantizeParams::amax, complete before the kernel starts
    kGiven = 2,  // QuantizeParams::descale is read, not written
};

struct QuantizeParams {
    TensorRef x;    // (batch, seqlen, heads, head_dim) or packed (total, heads, head_dim)
    TensorRef out;  // likewise, 8 bits; column-major: (batch, heads, head_dim, 128 * blocks), where
                    // row_stride steps over head_dim

    RowRef mean;          // (batch, heads, head_dim), subtracted from x; null: nothing
    RowRef mean_rotated;  // written: the mean in the basis of the data; null without a rotation
    float* mean_partial;  // (tiles, 2, head_dim): sums, and how many values were finite

    GroupRef descale;
    GroupRef amax;  // fp32 bits, gathered by atomic maximum; null: not wanted

    const float* rope_cos;  // (rope_rows, rotary_dim / 2), null: no rotary embedding
    const float* rope_sin;
    const std::int32_t* rope_offsets;  // (batch): the position of a sequence's first token; null: 0
    const std::int32_t* cu_seqlens;    // (batch + 1), null: dense
    const std::int32_t* seqused;       // (batch): tokens that count, null: all
    std::int64_t total;                // rows of a packed x

    std::int32_t batch;
    std::int32_t seqlen;  // of a dense x
    std::int32_t heads;
    std::int32_t head_dim;
    std::int32_t rope_rows;
    std::int32_t rotary_dim;
    std::int32_t interleaved;
    ScaleSource scale_source;
    std::int32_t hadamard_block;      // channels rotated together, a power of two; 0: no rotation
    float hadamard_scale;             // hadamard_block^-0.5
    std::uint32_t hadamard_signs[8];  // bit c: channel c changes its sign before the rotation
    std::int32_t reverse;             // last tile first: it may still be in L2 from the pass before
    std::int32_t reserved;            // zero
};

static_assert(kIsPlain<QuantizeParams> && alignof(QuantizeParams) == 8);
static_assert(sizeof(QuantizeParams) <= 4096);

}  // namespace flash8
