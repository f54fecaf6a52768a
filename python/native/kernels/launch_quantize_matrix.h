// An operand of an FP8 product, from matrices described by pointers and strides to a launch.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "matrix_params.h"

namespace flash8 {

// Enqueues a variant of cutlass_kernels/quantize/matrix.cu. The caller fills in all of `call` but
// vector_access, which follows from addresses and strides. Nothing is enqueued when x has no element.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take.
void launch_quantize_matrix(Kernel& kernel, int device, std::uint64_t stream,
                            const QuantizeMatrixParams& call);

}  // namespace flash8
