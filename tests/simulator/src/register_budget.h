// The registers of a CTA: what ptxas gives a thread at launch. setmaxnreg moves them about between the
// warpgroups and makes no new ones.
#pragma once

#include <cstdint>

#include "program.h"

namespace sim {

struct Cta;

// PTX does not say it; this is what ptxas 13.0 does (test_registers.py asks it). 0: ptxas cannot tell, and
// ignores setmaxnreg.
uint32_t registers_at_launch(const Kernel& kernel);

// What the warps of a CTA hold together.
uint64_t registers_held(const Cta& cta);

}  // namespace sim
