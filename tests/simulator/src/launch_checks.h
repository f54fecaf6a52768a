// What the driver refuses of a launch before anything runs.
#pragma once

#include "launch.h"

namespace sim {

// Puts the launch's cluster together: of its attribute (none: nothing was asked for) and of the kernel's
// directives. Throws where they disagree.
void choose_cluster(Launch& launch, const Dim3* asked);

// The limits of the device and the kernel. Throws at the first that is exceeded.
void check_limits(const Launch& launch);

}  // namespace sim
