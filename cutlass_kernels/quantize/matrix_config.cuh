// What a variant of matrix.cu fixes at compile time. The -D options come from
// flash8.backends.hopper.quantize_matrix_variants.

#pragma once

#include "kernel_info.h"
#include "matrix_params.h"
#include "quantize/elements.cuh"

namespace flash8::quantize {

enum class Prologue { kNone, kRmsNorm, kSiluMul };

struct MatrixConfig {
    static constexpr Input kInput = Input::FLASH8_DTYPE;
    static constexpr Prologue kPrologue = Prologue::FLASH8_PROLOGUE;
    static constexpr bool kNorm = kPrologue == Prologue::kRmsNorm;
    static constexpr bool kSilu = kPrologue == Prologue::kSiluMul;
    static constexpr KernelKind kKind = kNorm   ? KernelKind::kQuantizeRmsNorm
                                        : kSilu ? KernelKind::kQuantizeSiluMul
                                                : KernelKind::kQuantizeMatrix;

    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kMinCtas = 2;
    static constexpr int kColumns = 16;  // of a chunk: 16 bytes of output
    static constexpr int kChunks = 4;    // that a thread holds: 64 values fit 128 registers
    static constexpr int kBlockThreads = kScaleBlock / kColumns;  // neighbours that share a scale
};

}  // namespace flash8::quantize
