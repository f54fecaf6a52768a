// Launches that may overlap: each but the first was made with programmatic stream serialization behind the
// one before it. They share what the race check remembers, and a grid knows nothing of an earlier one until
// griddepcontrol.wait. They overlap in time, too, where the earlier one lets dependents begin before its end;
// otherwise they run one after the other.
#pragma once

#include <memory>

#include "memory_sync.h"

namespace sim {

struct Launch;
class GlobalShadow;

struct GridChain {
    void* stream = nullptr;
    std::shared_ptr<GlobalShadow> global;
    std::shared_ptr<SyncTable> sync;
    uint64_t clusters = 0;
    uint64_t finished = 0;  // a bit for each grid that is complete once the last one is
};

// Before a launch that runs with none before it. `dependent`: it was allowed to begin before the launch
// before it on its stream had ended.
void join_chain(Launch& launch, void* stream, bool dependent);
// Before a launch that runs together with the one before it.
bool can_follow(const Launch& launch, const Launch& prerequisite);
void follow(Launch& launch, const Launch& prerequisite);
// After the last of those that ran together.
void leave_chain(Launch& launch, void* stream);
// The host, or something else on a stream, waits for what was launched.
void end_chain();

// A bit for each earlier grid that the launch knows to be complete after griddepcontrol.wait.
uint64_t grids_before(const Launch& launch);

}  // namespace sim
