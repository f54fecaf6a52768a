// Before the kernel: what it needs of the rows of a block of queries, and zeros where it adds up dQ. One CTA
// per block of a query head; memory bound. Rows of dQ, dK and dV that belong to no sequence become zero here,
// too.

#include "preprocess.cuh"
#include "query_tile.cuh"

namespace flash8 {

using Config = PreprocessConfig;

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::Config::describe(
    flash8::KernelKind::kBackwardPreprocess, "flash8_backward_preprocess", flash8::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads)
    flash8_backward_preprocess(flash8::BackwardParams const __grid_constant__ params) {
    using namespace flash8;
    __shared__ float sums[Config::kThreads / 32];
    WorkTile const tile = query_tile<Config::Tiles::kBlockM>(params);
    if (tile.valid()) {
        Preprocess<Config> const preprocess(params, tile);
        if constexpr (Config::kFp8) {
            __shared__ KeySample<Config>::Sums keys;
            preprocess.store_key_mean(keys);
        }
        preprocess.run(sums);
    }
    zero_unused_rows<Config>(params);
}
