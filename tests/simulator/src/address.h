// From an address a kernel computed to bytes of the host, with every check on the way.
#pragma once

#include "machine.h"

namespace sim {

enum class AccessKind : uint8_t { kRead, kWrite, kAtomic };

// Bytes moved, by path; the names are in statistics.cpp.
enum class BytePath : uint8_t {
    kGlobalLoad,
    kGlobalStore,
    kSharedLoad,
    kSharedStore,
    kAtomic,
    kCpAsync,
    kTensorLoad,
    kTensorStore,
    kTensorReduce,
    kBulkLoad,
    kBulkStore,
    kBulkReduce,
    kCount
};

// The addresses of [base + offset] for the active lanes.
void lane_addresses(const Warp& warp, const Op& op, uint64_t* addresses);

// Whether the accesses of the lanes lie one behind the other.
bool is_one_run(const uint64_t* addresses, uint32_t size);

// Host pointer of one access of one lane. Throws on a bad one.
uint8_t* resolve(Warp& warp, const Op& op, uint64_t address, uint32_t size, AccessKind kind, int lane);
void resolve_lanes(Warp& warp, const Op& op, uint32_t mask, uint32_t size, AccessKind kind,
                   uint8_t** pointers);

// Global memory as an engine sees it (no lane): the range must be known.
uint8_t* resolve_global(Cluster& cluster, uint64_t address, uint64_t size, int line, const char* who);

// Splits a shared address into the CTA it means and the offset from kSharedBase.
Cta& shared_target(Warp& warp, uint32_t address, uint32_t size, bool cluster_allowed, int line,
                   uint32_t* offset);

void count_bytes(Cluster& cluster, BytePath path, uint64_t bytes);

}  // namespace sim
