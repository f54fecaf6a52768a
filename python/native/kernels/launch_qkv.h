// One QKV projection, from tensors described by pointers and strides to a launch.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "qkv_params.h"

namespace flash8 {

// Enqueues the kernel of cutlass_kernels/gemm/qkv.cu. Of `call.gemm` the caller fills in matrices, scales,
// bias and k; its m and n follow from the heads and the tokens. Nothing is enqueued when there is no token.
// What cu_seqlens holds is not read here: there are tiles for all blocks that packed sequences may have.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take.
void launch_qkv(Kernel& kernel, int device, std::uint64_t stream, const QkvParams& call);

}  // namespace flash8
