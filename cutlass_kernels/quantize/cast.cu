// The cast: by the tile's own amax in one pass over memory, by an amax found before, or by a given descale
// (which is delayed scaling, and gathers the amax of this step along the way).

#include "reduce.cuh"
#include "rows.cuh"
#include "v_colmajor.cuh"

namespace flash8::quantize {

struct SharedStorage {
    uint32_t warp_amax[Config::kWarps];
    VColMajorTile v_colmajor;
};

// One 16-byte store a row.
__device__ __forceinline__ void store_rows(QuantizeParams const& params, TokenTile const& tile,
                                           Rows const& rows, float inverse) {
    char* const out = static_cast<char*>(params.out.ptr) +
                      tile.tensor_batch(params) * params.out.batch_stride +
                      tile.head * params.out.head_stride + rows.channel;
#pragma unroll
    for (int j = 0; j < Config::kRows; ++j) {
        int const row = tile.first + rows.token(j);
        if (rows.inside && row < tile.capacity) {
            *reinterpret_cast<uint4*>(out + (tile.offset + row) * params.out.row_stride) =
                pack_row(rows.x[j], inverse);
        }
    }
}

// The descale of the tile; written unless the call gave it.
__device__ __forceinline__ float choose_descale(QuantizeParams const& params, TokenTile const& tile,
                                                uint32_t tile_amax) {
    float* const entry = params.descale.ptr + tile.group(params, params.descale);
    if (params.scale_source == ScaleSource::kGiven) {
        return checked_descale(*entry);
    }
    bool const own = params.scale_source == ScaleSource::kTile;
    float const* const amax = params.amax.ptr + (own ? 0 : tile.group(params, params.amax));
    float const descale = descale_of<Config::kE5m2>(own ? tile_amax : __float_as_uint(*amax));
    // All tiles of a group compute the same value.
    if (threadIdx.x == 0 && (own || tile.first == 0)) {
        *entry = descale;
    }
    return descale;
}

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe(
    flash8::KernelKind::kQuantize, "flash8_quantize_cast", flash8::quantize::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::quantize::Config::kThreads,
                                             flash8::quantize::Config::kMinCtas)
    flash8_quantize_cast(flash8::QuantizeParams const __grid_constant__ params) {
    using namespace flash8;
    using namespace flash8::quantize;
    __shared__ SharedStorage shared;
    TokenTile const tile = TokenTile::read(params);
    Rows rows(params);
    rows.prepare(params, tile);
    if (params.mean_rotated.ptr != nullptr) {
        rows.store_rotated_mean(params, tile);
    }
    uint32_t amax = 0;
    bool const gathers = params.scale_source == ScaleSource::kGiven && params.amax.ptr != nullptr;
    if (gathers || params.scale_source == ScaleSource::kTile) {
        amax = largest_of_cta(rows.amax(tile), shared.warp_amax);
    }
    if (gathers) {
        gather_amax(params.amax, tile.group(params, params.amax), amax);
    }
    float const inverse = reciprocal(choose_descale(params, tile, amax));
    if constexpr (Config::kVColMajor) {
        shared.v_colmajor.write(rows, tile, inverse);
        __syncthreads();
        shared.v_colmajor.store(params, tile);
    } else {
        store_rows(params, tile, rows, inverse);
    }
}
