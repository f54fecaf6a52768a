// One matrix product, from matrices described by pointers and strides to a launch.

#pragma once

#include <cstdint>

#include "driver/library.h"
#include "gemm_params.h"

namespace flash8 {

// Enqueues a kernel of cutlass_kernels/gemm. The caller fills in the matrices, scales, bias and sizes of
// `call`; tensor maps, the blocks of out and how they are walked and stored follow from these and from the
// kernel. Nothing is enqueued when out has no element. How many rows a group has is not read here: with
// groups there are CTAs for the most tiles that there may be.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernel cannot take.
void launch_gemm(Kernel& kernel, int device, std::uint64_t stream, const GemmParams& call);

// What else is launched with GemmParams shares these two. The first checks sizes, bias and scales. The second
// encodes tensor maps and fills in how so many blocks of out are walked; it gives the number of CTAs.
void check_gemm_operands(const GemmParams& call, const KernelInfo& info);
std::int64_t prepare_gemm_tiles(Kernel& kernel, int device, std::int64_t m_blocks, std::int64_t n_blocks,
                                GemmParams& params);

}  // namespace flash8
