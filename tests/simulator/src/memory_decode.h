// Modifiers that loads, stores and atomics share.
#pragma once

#include "decoder.h"

namespace sim {

// Ordering and scope; 1 when the access takes part in synchronization.
uint16_t take_memory_order(Decoder& d);
// Cache operators and eviction hints; true when a cache-policy operand follows.
bool take_cache_hints(Decoder& d);

}  // namespace sim
