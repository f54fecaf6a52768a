// Synchronization through memory, as PTX's memory model has it: strong accesses and fences with scopes.
//
// A strong write after a release (its own, or a fence's) leaves with its address what happened before that
// release. A strong read finds it there, and an acquire (its own, or a later fence) makes it count. Both
// sides' scopes must include the other: of the accesses and of the fences. A read-modify-write passes on
// what it finds; a plain strong store does not.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "order.h"

namespace sim {

struct Op;
struct Warp;
struct Cta;
struct Cluster;

// How far a strong access or fence reaches. sys is gpu here.
enum Level : uint8_t { kWeak, kCtaLevel, kClusterLevel, kGpuLevel };

// Op::memory_order
constexpr uint8_t kAcquires = 1, kReleases = 2;

struct Publication {
    uint64_t cluster = 0;  // of the publisher; its clocks are of that cluster
    uint32_t rank = 0;
    uint32_t agent = 0;
    uint32_t time = 0;  // the publisher's own clock, where all its lanes released; else 0
    bool many = false;  // of several clusters: all there is lies in order.far and order.far_proxy
    Order order;        // far and far_proxy have the publisher's own cluster, too
};
struct Published {
    Level level = kWeak;
    std::shared_ptr<const Publication> what;
};
using SyncTable = std::unordered_map<uint64_t, std::vector<Published>>;

// What a warp's fences have released, and what its reads found and no fence has acquired yet.
struct WarpSync {
    std::vector<Published> released;
    std::vector<Published> found;
};

// A strong access of one lane; an address of shared memory is that of its window. `own` is what the
// instruction releases: one for all its lanes, made when the first needs it.
void strong_read(Warp& warp, const Op& op, uint64_t address);
void strong_write(Warp& warp, const Op& op, uint64_t address, bool reads_too, uint32_t lanes,
                  std::shared_ptr<const Publication>& own);
void fence(Warp& warp, Level level, uint32_t lanes);

}  // namespace sim
