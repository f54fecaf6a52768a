// Runs instructions of one fragment of a warp.
#pragma once

#include "machine.h"

namespace sim {

// Up to `budget` instructions of the current fragment, less when it blocks, yields or diverges away.
// Returns how many ran.
uint32_t run_warp(Warp& warp, uint32_t budget, bool check_registers);

}  // namespace sim
