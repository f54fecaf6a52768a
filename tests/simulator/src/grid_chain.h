// Launches that may overlap: each but the first was made with programmatic stream serialization behind the
// one before it. They run one after the other, but share what the race check remembers, and a grid knows
// nothing of an earlier one until griddepcontrol.wait.
#pragma once

#include <memory>

#include "memory_sync.h"

namespace sim {

struct Launch;
class GlobalShadow;

struct GridChain {
    void* stream = nullptr;
    std::shared_ptr<GlobalShadow> global;
    SyncTable sync;
    uint64_t clusters = 0;
    uint64_t finished = 0;  // a bit for each grid that is complete once the last one is
};

// Before and after a launch. `dependent`: it may begin before the launch before it on its stream has ended.
void join_chain(Launch& launch, void* stream, bool dependent);
void leave_chain(Launch& launch, void* stream);
// The host, or something else on a stream, waits for what was launched.
void end_chain();

}  // namespace sim
