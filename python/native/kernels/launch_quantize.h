// One launch of a quantizer kernel.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "quantize_params.h"

namespace flash8 {

// Enqueues a kernel of cutlass_kernels/quantize over all tiles of the call (kQuantizeMeanFinish: over all
// heads of all sequences). Nothing is enqueued when there is no tile.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take. Values inside
// index tensors lie on the device and are the caller's to check.
void launch_quantize(Kernel& kernel, int device, std::uint64_t stream, const QuantizeParams& call);

}  // namespace flash8
