// mbarrier objects: arrivals, transaction counts, phases.
#pragma once

#include "machine.h"

namespace sim {

// The live barrier at an offset of a CTA's shared memory; throws when there is none.
Mbarrier& mbarrier_at(Cta& cta, uint32_t offset, int line);

// Bytes of a transfer have landed. `issued_phase` is the barrier's phase when it was issued.
void complete_transfer(Cta& cta, uint32_t offset, uint32_t bytes, uint64_t issued_phase, const Clock& clock,
                       const Clock& proxy, int line);

// One arrival made by an engine on behalf of a warp (cp.async.mbarrier.arrive).
void arrive_for(Cta& cta, uint32_t offset, uint32_t count, const Clock& clock, const Clock& proxy, int line);

// cp.async.mbarrier.arrive without .noinc: the phase expects one arrival more.
void expect_one_more(Cta& cta, uint32_t offset, int line);

bool mbarrier_ready(Cta& cta, const Wait& wait);
std::string describe_mbarrier(Cta& cta, uint32_t offset);

}  // namespace sim
