// One launch of the appending kernel.

#pragma once

#include <cstdint>

#include "append_params.h"
#include "driver/library.h"

namespace flash8 {

// Enqueues cutlass_kernels/quantize/append.cu over the tokens and heads of Q, K and V. Nothing is enqueued
// without sequences.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take. Values inside
// index tensors lie on the device and are the caller's to check.
void launch_append(Kernel& kernel, int device, std::uint64_t stream, const AppendParams& call);

}  // namespace flash8
