// What must hold around a wgmma: fences before it, hands off until its wait.
#pragma once

#include "wgmma.h"

namespace sim {

// At the issue: defined operands, and a wgmma.fence after the last ordinary write to its registers.
void check_issue(const Warp& warp, const Op& op, const WgmmaShape& shape, bool scale_d);
void mark_in_flight(Warp& warp, const WgmmaShape& shape, uint32_t item);
// What the issuing warps know of others' writes, for the check of the operands in shared memory.
void note_issue_clocks(Warp& warp, WgmmaItem& item);
void check_operands(Cta& cta, Warpgroup& group, uint32_t item);

}  // namespace sim
