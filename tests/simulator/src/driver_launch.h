// Launches that the driver holds back: of kernels that let dependents begin early (griddepcontrol.
// launch_dependents). A dependent launch right behind one on its stream runs together with it; whatever else
// is asked of the driver lets those that are held run first.
#pragma once

namespace sim::driver {

// Lets them run. An error is kept for the next call that may return one of an earlier launch.
void run_held_launches();

// Such a call: the host, or something else on a stream, waits for what was launched. Returns the error.
int wait_for_launches();

}  // namespace sim::driver
