// Named barriers of a CTA and the barrier of a cluster.
#pragma once

#include "machine.h"

namespace sim {

void settle_named_barriers(Cta& cta);  // after a warp exited
void settle_cluster_barrier(Cluster& cluster);

}  // namespace sim
