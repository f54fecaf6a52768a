// New tokens into a KV cache, dense or paged, of 16 or 8 bits: one launch over the heads of Q, K and V.
// A thread has eight channels of one token and head.

#include "kernel_info.h"
#include "quantize/new_row.cuh"

namespace flash8::quantize {

// What a variant fixes at compile time. The -D options come from flash8.backends.hopper.append_variants.
enum class Cache { kSame, kE4m3 };

struct AppendConfig {
    static constexpr Input kInput = Input::FLASH8_DTYPE;
    static constexpr bool kQuantizes = Cache::FLASH8_CACHE == Cache::kE4m3;
    static constexpr int kThreads = 256;
    static constexpr int kMinCtas = 4;
    static_assert(!kQuantizes || kInput != Input::kE4m3);
};

constexpr KernelInfo describe_append() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(AppendParams);
    info.kind = KernelKind::kQuantizeAppend;
    constexpr char kEntry[] = "flash8_append";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = 1;  // a CTA has channels of some tokens, whose number depends on the head dimension
    info.threads = AppendConfig::kThreads;
    info.min_ctas_per_sm = AppendConfig::kMinCtas;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.scale_block = kScaleBlock;
    return info;
}

__device__ __forceinline__ void append(AppendParams const& params, AppendedRows const& rows, bool is_query,
                                       int head) {
    int const groups = rows.head_dim / kGroup;
    int const item = blockIdx.x * AppendConfig::kThreads + threadIdx.x;
    if (item / groups >= rows.tokens) {
        return;
    }
    int const channel = item % groups * kGroup;
    NewToken const token(rows, params.batch, item / groups);
    int64_t const element = token.element + head * rows.x.head_stride;
    auto group = Group<AppendConfig::kInput>::load(rows.x, element + channel);
    Place place{};
    if (!is_query) {
        place = Place(params.place, token);
        if (!place.exists) {
            return;
        }
    }
    int64_t const target = (is_query ? token.out_element
                                     : place.slot * rows.out.batch_stride + place.row * rows.out.row_stride) +
                           head * rows.out.head_stride + channel;
    if constexpr (AppendConfig::kInput == Input::kE4m3) {
        group.store(rows.out, target);
    } else {
        float y[kGroup];
        normalise_and_turn(params.rotary, rows, token, element, channel, group, y);
        if (AppendConfig::kQuantizes && !is_query) {
            *reinterpret_cast<uint2*>(static_cast<char*>(rows.out.ptr) + target) =
                quantized(rows, head, channel, token, place, y);
        } else {
            group.store(rows.out, target);
        }
    }
}

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe_append();

extern "C" __global__ void __launch_bounds__(flash8::quantize::AppendConfig::kThreads,
                                             flash8::quantize::AppendConfig::kMinCtas)
    flash8_append(flash8::AppendParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    if (blockIdx.y == 0 && params.lengths != nullptr) {
        write_lengths(params, AppendConfig::kThreads);
    }
    int head = blockIdx.y;
    int kind = 0;
    while (head >= params.rows[kind].heads) {
        head -= params.rows[kind].heads;
        ++kind;
    }
    append(params, params.rows[kind], kind == 0, head);
}
