// New tokens into an 8-bit KV cache, dense or paged, by the descales that the cache has already.

#include "rows.cuh"

namespace flash8::quantize {

// Where one token goes.
struct Place {
    static constexpr unsigned kFarthest = 0x7fffffff;

    int slot;
    int row;    // within the slot
    int block;  // of the slot's descales
    bool exists;

    __device__ Place(AppendParams const& append, int batch, int token) {
        // There is no place after a negative length, or past the range of 32 bits.
        int const length = append.cache_seqlens[batch];
        int const position =
            length < 0 ? -1 : static_cast<int>(min(static_cast<unsigned>(length) + token, kFarthest));
        if (append.page_table != nullptr) {
            int const column = position / append.slot_tokens;
            bool const listed = position >= 0 && column < append.max_pages;
            slot = listed ? append.page_table[batch * append.page_table_stride + column] : -1;
            row = position % append.slot_tokens;
            block = 0;
        } else {
            slot = append.kv_batch_idx != nullptr ? append.kv_batch_idx[batch] : batch;
            row = position;
            block = position / Config::kTokens;
        }
        exists = position >= 0 && slot >= 0 && slot < append.num_slots && row < append.slot_tokens;
    }
};

__device__ __forceinline__ float inverse_descale(QuantizeParams const& params, TokenTile const& tile,
                                                 Place const& place) {
    GroupRef const& ref = params.descale;
    if (ref.ptr == nullptr) {
        return 1.0f;
    }
    int const batch = params.append.descale_by_slot ? place.slot : tile.batch;
    return reciprocal(checked_descale(
        ref.ptr[batch * ref.batch_stride + tile.head * ref.head_stride + place.block * ref.block_stride]));
}

__device__ __forceinline__ void append_row(QuantizeParams const& params, TokenTile const& tile,
                                           Rows const& rows, int j) {
    int const token = tile.first + rows.token(j);
    if (!rows.counts(tile, j)) {
        return;
    }
    Place const place(params.append, tile.batch, token);
    if (!place.exists) {
        return;
    }
    float const inverse = inverse_descale(params, tile, place);
    char* const out = static_cast<char*>(params.out.ptr) + place.slot * params.out.batch_stride +
                      place.row * params.out.row_stride + tile.head * params.out.head_stride;
    *reinterpret_cast<uint4*>(out + rows.channel) = pack_row(rows.x[j], inverse);
}

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe(
    flash8::KernelKind::kQuantizeAppend, "flash8_quantize_append", flash8::quantize::Config::kThreads);

extern "C" __global__ void __launch_bounds__(flash8::quantize::Config::kThreads,
                                             flash8::quantize::Config::kMinCtas)
    flash8_quantize_append(flash8::QuantizeParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    TokenTile const tile = TokenTile::read(params);
    Rows rows(params);
    rows.prepare(params, tile);
#pragma unroll
    for (int j = 0; j < Config::kRows; ++j) {
        append_row(params, tile, rows, j);
    }
}
