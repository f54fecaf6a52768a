// What the three kernels of the backward are compiled for together. The -D options come from
// flash8.backends.hopper.variants, with enumerators by name.

#pragma once

#include "../kernel_info.h"
#include "params.h"
#include "tile_size.cuh"

#include <cutlass/numeric_types.h>
#include <type_traits>

namespace flash8 {

enum class ElementChoice { kFp16, kBf16 };

struct BackwardVariant {
    using Element = std::conditional_t<ElementChoice::FLASH8_DTYPE == ElementChoice::kFp16, cutlass::half_t,
                                       cutlass::bfloat16_t>;
    static constexpr int kHeadDim = FLASH8_HEAD_DIM;
    static constexpr int kHeadDimV = FLASH8_HEAD_DIM_V;
    // Q, K and V are those of an FP8 forward. S comes from them, all other products are in 16 bits.
    static constexpr bool kFp8 = FLASH8_FP8;
    using Stored = std::conditional_t<kFp8, cutlass::float_e4m3_t, Element>;  // q, k and v
    using Tiles = BackwardTiles<kHeadDim, kHeadDimV, kFp8>;

    // What the host reads of each of them; kernel.cu adds more.
    template <unsigned kLength>
    static constexpr KernelInfo describe(KernelKind kind, char const (&entry)[kLength], int threads) {
        KernelInfo info{};
        info.abi_version = kAbiVersion;
        info.info_bytes = sizeof(KernelInfo);
        info.params_bytes = sizeof(BackwardParams);
        info.kind = kind;
        for (unsigned i = 0; i < kLength; ++i) {
            info.entry[i] = entry[i];
        }
        info.kBlockM = Tiles::kBlockM;
        info.kBlockN = Tiles::kBlockN;
        info.kHeadDim = kHeadDim;
        info.kHeadDimV = kHeadDimV;
        info.threads = threads;
        info.min_ctas_per_sm = 1;
        info.scale_block = kFp8 ? kScaleBlock : 0;
        info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
        return info;
    }
};

}  // namespace flash8
