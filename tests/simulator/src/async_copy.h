// cp.async and its groups; bulk groups live here too, for they are waited for in the same way.
#pragma once

#include "machine.h"

namespace sim {

// All groups of the lanes but the newest `allowed` are done. kAllGroups: also what is not committed.
constexpr uint32_t kAllGroups = 0xffffffffu;
bool cp_async_done(const Warp& warp, uint32_t lanes, uint32_t allowed);
bool bulk_groups_done(const Warp& warp, uint32_t lanes, uint32_t allowed, bool reads_only);

}  // namespace sim
