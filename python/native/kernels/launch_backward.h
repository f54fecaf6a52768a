// One backward call: three kernels, one after the other on one stream (backward/params.h).

#pragma once

#include <cstdint>

#include "backward/params.h"
#include "driver/library.h"

namespace flash8 {

// Of one variant: compiled for the same tiles.
struct BackwardKernels {
    Kernel& preprocess;
    Kernel& kernel;
    Kernel& postprocess;
};

// What each part of the workspace of a call takes, in bytes. The pointers in BackwardParams have the same
// names, and lie at multiples of kWorkspaceUnit.
struct BackwardWorkspace {
    std::int64_t row_stats;
    std::int64_t dq_accum;
    std::int64_t dq_semaphore;
    std::int64_t dsinks_partial;  // 0 without dsinks
    std::int64_t dkv_partial;     // 0 without head_splits
    std::int64_t q16;             // 0 without FP8, and so is the next one
    std::int64_t key_mean;
};
inline constexpr std::int64_t kWorkspaceUnit = 128;

// From the tensors' sizes, the sequences, dsinks and head_splits of `call`. Throws as launch_backward does.
BackwardWorkspace backward_workspace(const Kernel& kernel, const BackwardParams& call);

// Enqueues the kernels. The caller fills in the tensors, sequences, scores, head counts and workspace of
// `call`, head_splits and heads_per_section of the scheduler (0 is 1). What follows from them and from the
// kernel is filled in here: tensor maps, log2 scale, blocks. Nothing is enqueued when neither Q nor K has a
// row. max_seqlen_q/k are the lengths of dense tensors, total_q/k the rows of packed ones.
//
// Throws std::invalid_argument for sizes, strides or addresses that the kernels cannot take. Values inside
// index tensors lie on the device, which brings them into range.
void launch_backward(const BackwardKernels& kernels, int device, std::uint64_t stream,
                     const BackwardParams& call);

}  // namespace flash8
