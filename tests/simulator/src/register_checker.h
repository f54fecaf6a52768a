// Registers: never written, or in the hands of a wgmma that has not been waited for.
#pragma once

#include "machine.h"

namespace sim {

void check_guard(Warp& warp, const Op& op, uint32_t mask);

// Before an instruction: its sources must be usable, its destinations free. Marks what it will write.
// A move of an accumulator in flight is put in the warp's queue behind the wgmma.
void check_registers_before(Warp& warp, const Op& op, uint32_t mask);

}  // namespace sim
