// One decode call, from tensors described by pointers and strides to a launch.

#pragma once

#include <cstdint>

#include "decode/params.h"
#include "driver/library.h"

namespace flash8 {

// What a launch needs besides its tensors, in bytes: it depends on the kernel and the number of CTAs, and
// neither on the batch nor on any length. With split_keys there is a partial result for each split that there
// is room for.
struct DecodeWorkspace {
    std::int64_t partials;
    std::int64_t tickets;  // zero before the launch, and zero again after it
};

DecodeWorkspace decode_workspace(const Kernel& kernel, int device, const DecodeParams& call, int sm_margin);

// Enqueues the decode kernel. The caller fills in tensors, descales, sequences, scores, head counts, the page
// table, page_size, num_pages, and the workspace. What follows from them and from the kernel is filled in
// here. Nothing is enqueued when O has no row. The number of CTAs depends on sizes only, never on what the
// device holds. sm_margin multiprocessors are left to others. For a kernel that appends, the caller gives the
// new rows of K and V, norms, tables of rotary embedding, and whether rows rotate and advance.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take.
void launch_decode(Kernel& kernel, int device, std::uint64_t stream, const DecodeParams& call, int sm_margin);

}  // namespace flash8
