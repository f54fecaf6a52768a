// One launch of the kernel that makes scheduler metadata.

#pragma once

#include <cstdint>

#include "decode/schedule_params.h"
#include "driver/library.h"

namespace flash8 {

// Enqueues hopper/decode/schedule.cu, one CTA. What indices hold lies on the device; the decode kernels that
// read the metadata notice whatever is wrong with it.
//
// Throws std::invalid_argument for sizes or addresses that the kernel cannot take.
void launch_schedule(Kernel& kernel, int device, std::uint64_t stream, const ScheduleParams& call);

}  // namespace flash8
