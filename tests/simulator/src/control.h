// Branches, divergence and the end of threads.
#pragma once

#include "program.h"

namespace sim {

Op make_join_point(int line);
Op make_exit(int line);

// Ends the lanes of `mask`; drops the current fragment when none of its lanes is left.
Step exit_lanes(Warp& warp, uint32_t mask);

}  // namespace sim
