// What a variant fixes at compile time. The -D options come from flash8.backends.hopper.quantize_variants.

#pragma once

#include "kernel_info.h"
#include "quantize/elements.cuh"
#include "quantize_params.h"

namespace flash8::quantize {

enum class Output { kE4m3, kE5m2 };

struct Config {
    static constexpr Input kInput = Input::FLASH8_DTYPE;
    static constexpr bool kE5m2 = Output::FLASH8_OUT == Output::kE5m2;
    static constexpr bool kVColMajor = FLASH8_V_COLMAJOR == 1;
    static constexpr int kHeadDim = FLASH8_HEAD_DIM;  // the tile's; a call may have fewer channels

    static constexpr int kTokens = 128;
    static constexpr int kChannels = 16;                  // of a thread: 16 bytes of output
    static constexpr int kLanes = kHeadDim / kChannels;   // threads that hold a token
    static constexpr int kRows = 4;                       // tokens of a thread
    static constexpr int kRowGroups = kTokens / kRows;    // groups of kLanes threads
    static constexpr int kThreads = kRowGroups * kLanes;  // 128, 256, 512
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kMinCtas = 1024 / kThreads / 2;  // 64 values and their addresses fit 128 registers
    static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
};

template <unsigned kLength>
constexpr KernelInfo describe(KernelKind kind, char const (&entry)[kLength], int threads) {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(QuantizeParams);
    info.kind = kind;
    for (unsigned i = 0; i < kLength; ++i) {
        info.entry[i] = entry[i];
    }
    info.kBlockM = Config::kTokens;
    info.kHeadDim = info.kHeadDimV = Config::kHeadDim;
    info.threads = threads;
    info.min_ctas_per_sm = Config::kMinCtas;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.scale_block = Config::kTokens;
    return info;
}

}  // namespace flash8::quantize
