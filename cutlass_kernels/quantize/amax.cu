// amax by tensor or by head, the pass before the cast.

#include "reduce.cuh"
#include "rows.cuh"

namespace flash8::quantize {

struct SharedStorage {
    uint32_t warp_amax[Config::kWarps];
};

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe(
    flash8::KernelKind::kQuantizeAmax, "flash8_quantize_amax", flash8::quantize::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::quantize::Config::kThreads,
                                             flash8::quantize::Config::kMinCtas)
    flash8_quantize_amax(flash8::QuantizeParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    __shared__ SharedStorage shared;
    TokenTile const tile = TokenTile::read(params);
    Rows rows(params);
    rows.prepare(params, tile);
    uint32_t const amax = largest_of_cta(rows.amax(tile), shared.warp_amax);
    gather_amax(params.amax, tile.group(params, params.amax), amax);
}
