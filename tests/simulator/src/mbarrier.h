// mbarrier objects: arrivals, transaction counts, phases.
#pragma once

#include "machine.h"

namespace sim {

constexpr int64_t kMaxMbarrierCount = (1 << 20) - 1;

uint32_t mbarrier_address(const Cta& cta, uint32_t offset);

// Steps of an arrival or a transfer; the last completes the phase when both counts are zero.
void add_transaction(Cta& cta, uint32_t offset, Mbarrier& barrier, int64_t bytes, int line);
void take_arrivals(Cta& cta, uint32_t offset, Mbarrier& barrier, uint32_t count, int line);
void complete_phase_if_done(Cta& cta, Mbarrier& barrier);

// The live barrier at an offset of a CTA's shared memory; throws when there is none.
Mbarrier& mbarrier_at(Cta& cta, uint32_t offset, int line);

// Bytes of a transfer have landed. `issued_phase` is the barrier's phase when it was issued.
void complete_transfer(Cta& cta, uint32_t offset, uint32_t bytes, uint64_t issued_phase, const Order& order,
                       int line);

// One arrival made by an engine on behalf of a warp (cp.async.mbarrier.arrive).
void arrive_for(Cta& cta, uint32_t offset, uint32_t count, const Order& order, int line);

// The barrier's initialization happens before its use by the warp; by an engine: and is fenced.
void check_init(const Warp& warp, const Cta& cta, uint32_t offset, const Mbarrier& barrier, bool by_engine,
                int line);

// cp.async.mbarrier.arrive without .noinc: the phase expects one arrival more.
void expect_one_more(Cta& cta, uint32_t offset, int line);

bool mbarrier_ready(Cta& cta, const Wait& wait);
std::string describe_mbarrier(Cta& cta, uint32_t offset);

}  // namespace sim
