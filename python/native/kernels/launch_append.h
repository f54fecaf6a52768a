// One launch of the appending kernel.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "quantize/append_params.h"

namespace flash8 {

// How many threads an append takes, each of which has eight channels of a row.
struct AppendItems {
    std::int64_t of_head;  // at most
    std::int64_t heads;    // of Q, K and V together
};

// Throws std::invalid_argument for sizes, strides or addresses that no kernel takes which appends.
AppendItems check_append(const AppendParams& call);

// Enqueues cutlass_kernels/quantize/append.cu over the tokens and heads of Q, K and V. Nothing is enqueued
// without sequences.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take. Values inside
// index tensors lie on the device and are the caller's to check.
void launch_append(Kernel& kernel, int device, std::uint64_t stream, const AppendParams& call);

}  // namespace flash8
