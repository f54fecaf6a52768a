// The second half of the mean: adds the partial sums of a sequence and head, tile by tile, and divides.

#include "quantize/arithmetic.cuh"
#include "tokens.cuh"

namespace flash8::quantize {

constexpr int kFinishThreads = 1024;
constexpr int kFinishGroups = kFinishThreads / Config::kHeadDim;  // tiles added side by side

struct SharedStorage {
    float sum[kFinishGroups][Config::kHeadDim];
    float number[kFinishGroups][Config::kHeadDim];
};

// The tiles of a sequence: blocks [begin, end) of the grid's order.
struct BlockRange {
    int begin;
    int end;

    __device__ BlockRange(QuantizeParams const& params, int batch) {
        if (params.cu_seqlens != nullptr) {
            PackedOffsets const offsets = offsets_of(params);
            begin = first_block(offsets[batch], batch);
            end = first_block(offsets[batch + 1], batch + 1);
        } else {
            int const blocks = max(1, (params.seqlen + Config::kTokens - 1) / Config::kTokens);
            begin = batch * blocks;
            end = begin + blocks;
        }
    }
};

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe(
    flash8::KernelKind::kQuantizeMeanFinish, "flash8_quantize_mean_finish", flash8::quantize::kFinishThreads);

extern "C" __global__ void __launch_bounds__(flash8::quantize::kFinishThreads, 1)
    flash8_quantize_mean_finish(flash8::QuantizeParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    __shared__ SharedStorage shared;
    int const head = blockIdx.x % params.heads;
    int const batch = blockIdx.x / params.heads;
    int const channel = threadIdx.x % Config::kHeadDim;
    int const group = threadIdx.x / Config::kHeadDim;
    bool const inside = channel < params.head_dim;
    BlockRange const blocks(params, batch);
    float sum = 0.0f;
    float number = 0.0f;
    if (inside) {
#pragma unroll 4
        for (int block = blocks.begin + group; block < blocks.end; block += kFinishGroups) {
            int64_t const tile = static_cast<int64_t>(block) * params.heads + head;
            float const* const partial = params.mean_partial + tile * 2 * params.head_dim + channel;
            sum = add(sum, partial[0]);
            number = add(number, partial[params.head_dim]);
        }
    }
    shared.sum[group][channel] = sum;
    shared.number[group][channel] = number;
    __syncthreads();
    if (group == 0 && inside) {
        for (int other = 1; other < kFinishGroups; ++other) {
            sum = add(sum, shared.sum[other][channel]);
            number = add(number, shared.number[other][channel]);
        }
        float* const mean =
            params.mean.ptr + batch * params.mean.batch_stride + head * params.mean.head_stride;
        mean[channel] = divide(sum, fmaxf(number, 1.0f));
    }
}
