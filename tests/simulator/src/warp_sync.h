// Meeting of the lanes of a warp that a .sync instruction names.
#pragma once

#include "machine.h"

namespace sim {

// True when every lane of `members` that has not exited stands at this instruction; then *joint has
// them all, and the fragments beside the running one have been moved past it. False: the fragment
// waits (return Step::kBlocked).
bool meet(Warp& warp, const Op& op, uint32_t members, uint32_t* joint);
bool can_meet(const Warp& warp, const Fragment& fragment);

// For .aligned instructions: all lanes of the warp.
bool meet_all(Warp& warp, const Op& op, uint32_t* joint);

}  // namespace sim
