// One forward call, from tensors described by pointers and strides to a launch.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "forward/params.h"

namespace flash8 {

// Enqueues the forward kernel. The caller fills in the tensors, sequences, scores and head counts of `call`,
// and of the scheduler tile_count (null: every CTA gets the same number of tiles), heads_per_section (0 is 1)
// and longest_first. What follows from them and from the kernel is filled in here: tensor maps, log2 scale,
// the rest of the scheduler. Nothing is enqueued when O has no row. max_seqlen_q/k must bound every sequence,
// total_q/k are the rows of packed tensors. sm_margin multiprocessors are left to others.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take. Values inside
// index tensors lie on the device and are the caller's to check.
void launch_forward(Kernel& kernel, int device, std::uint64_t stream, const ForwardParams& call,
                    int sm_margin);

}  // namespace flash8
