// Sums over the tokens of a tile, the first half of K's or V's mean. The additions have a fixed order, so the
// result does not depend on timing.

#include "rows.cuh"

namespace flash8::quantize {

struct SharedStorage {
    float sum[Config::kWarps][Config::kHeadDim];
    float number[Config::kWarps][Config::kHeadDim];
};

// Over the row groups of a warp.
__device__ __forceinline__ float sum_over_groups(float value) {
#pragma unroll
    for (int step = Config::kLanes; step < 32; step *= 2) {
        value = add(value, __shfl_xor_sync(0xffffffff, value, step));
    }
    return value;
}

__device__ __forceinline__ void sum_of_warp(Rows const& rows, TokenTile const& tile, SharedStorage& shared) {
    int const warp = threadIdx.x / 32;
#pragma unroll
    for (int c = 0; c < Config::kChannels; ++c) {
        float sum = 0.0f;
        float number = 0.0f;
#pragma unroll
        for (int j = 0; j < Config::kRows; ++j) {
            bool const finite = (__float_as_uint(rows.x[j][c]) & kMagnitude) < kInfinity;
            bool const counts = finite && rows.counts(tile, j);
            sum = add(sum, counts ? rows.x[j][c] : 0.0f);
            number = add(number, counts ? 1.0f : 0.0f);
        }
        sum = sum_over_groups(sum);
        number = sum_over_groups(number);
        if (threadIdx.x % 32 < Config::kLanes) {
            shared.sum[warp][rows.channel + c] = sum;
            shared.number[warp][rows.channel + c] = number;
        }
    }
}

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe(
    flash8::KernelKind::kQuantizeMean, "flash8_quantize_mean", flash8::quantize::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::quantize::Config::kThreads,
                                             flash8::quantize::Config::kMinCtas)
    flash8_quantize_mean(flash8::QuantizeParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    __shared__ SharedStorage shared;
    TokenTile const tile = TokenTile::read(params);
    Rows rows(params);
    rows.load_in_position(params, tile);
    sum_of_warp(rows, tile, shared);
    __syncthreads();
    // The threads are two for every channel: one adds the sums, one the numbers.
    int const channel = threadIdx.x % Config::kHeadDim;
    int const which = threadIdx.x / Config::kHeadDim;
    if (channel < params.head_dim) {
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Config::kWarps; ++warp) {
            total = add(total, which == 0 ? shared.sum[warp][channel] : shared.number[warp][channel]);
        }
        int64_t const partial = static_cast<int64_t>(tile.index) * 2 + which;
        params.mean_partial[partial * params.head_dim + channel] = total;
    }
}
