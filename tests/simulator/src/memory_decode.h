// Modifiers that loads, stores and atomics share.
#pragma once

#include "decoder.h"

namespace sim {

// Ordering and scope, into the Op; `otherwise`: the scope where neither is written.
void take_memory_order(Decoder& d, Level otherwise);
// Cache operators and eviction hints; true when a cache-policy operand follows.
bool take_cache_hints(Decoder& d);

}  // namespace sim
