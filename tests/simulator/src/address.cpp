#include "address.h"

#include "checker.h"
#include "errors.h"
#include "global_shadow.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

[[noreturn]] void misaligned(uint64_t address, uint32_t size, int lane, int line) {
    throw SimError(ErrorKind::kMisaligned,
                   format("lane %d: address 0x%llx is not aligned to the %u bytes of the access", lane,
                          static_cast<unsigned long long>(address), size),
                   line);
}

uint8_t* resolve_shared(Warp& w, uint32_t address, uint32_t size, bool cluster_allowed, AccessKind kind,
                        const Op& op, int lane) {
    uint32_t offset = 0;
    Cta& cta = shared_target(w, address, size, cluster_allowed, op.line, &offset);
    if (kind == AccessKind::kRead) {
        generic_read(w, cta, offset, size, op, lane);
    } else {
        generic_write(w, cta, offset, size, op, lane);
    }
    return cta.shared.data() + offset;
}

uint8_t* resolve_local(Warp& w, uint64_t offset, uint32_t size, int lane, int line) {
    const uint64_t bytes = w.program->local_bytes;
    if (offset + size > bytes) {
        throw SimError(
            ErrorKind::kOutOfBounds,
            format("lane %d: local address 0x%llx + %u is past the %llu bytes of local memory", lane,
                   static_cast<unsigned long long>(offset), size, static_cast<unsigned long long>(bytes)),
            line);
    }
    return w.local_storage.data() + static_cast<uint64_t>(lane) * bytes + offset;
}

uint8_t* resolve_param(Warp& w, uint64_t offset, uint32_t size, int line) {
    ParamBytes& params = w.cta->cluster->launch->params;
    if (offset + size > params.size()) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("parameter address %llu + %u is past the %zu bytes of parameters",
                              static_cast<unsigned long long>(offset), size, params.size()),
                       line);
    }
    return params.data() + offset;
}

bool in_params(const Cluster& cluster, uint64_t address, uint64_t size) {
    const ParamBytes& params = cluster.launch->params;
    const uint64_t begin = reinterpret_cast<uint64_t>(params.data());
    return address >= begin && address + size <= begin + params.size();
}

// Finds the range of a global access; remembers it, for the next one is mostly in the same.
bool known_global(Cluster& cluster, uint64_t address, uint64_t size) {
    const MemoryRange* range = cluster.last_range;
    if (range != nullptr && address >= range->begin && address + size <= range->end) {
        return true;
    }
    range = find_range(*cluster.launch->memory, address);
    if (range == nullptr || address + size > range->end) {
        return in_params(cluster, address, size);
    }
    cluster.last_range = range;
    return true;
}

uint8_t* resolve_global_lane(Warp& w, uint64_t address, uint32_t size, int lane, int line) {
    Cluster& cluster = *w.cta->cluster;
    if (cluster.launch->config.strict_global && !known_global(cluster, address, size)) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("lane %d: access of %u bytes: %s", lane, size,
                              describe_address(*cluster.launch->memory, address).c_str()),
                       line);
    }
    return reinterpret_cast<uint8_t*>(address);
}

// What a warp mostly touches: all lanes in a row, aligned and known.
bool known_run(Cluster& cluster, uint64_t address, uint32_t size) {
    const uint64_t all = uint64_t{size} * kLanes;
    return (address & (size - 1)) == 0 && address + all <= kSharedWindow &&
           (!cluster.launch->config.strict_global || known_global(cluster, address, all));
}

}  // namespace

bool is_one_run(const uint64_t* addresses, uint32_t size) {
    uint64_t apart = 0;
    for (uint32_t i = 0; i < kLanes; ++i) {
        apart |= addresses[i] - addresses[0] - uint64_t{i} * size;
    }
    return apart == 0;
}

void count_bytes(Cluster& cluster, BytePath path, uint64_t bytes) {
    cluster.bytes[static_cast<size_t>(path)] += bytes;
}

uint8_t* resolve_global(Cluster& cluster, uint64_t address, uint64_t size, int line, const char* who) {
    if (cluster.launch->config.strict_global && !known_global(cluster, address, size)) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("%s of %llu bytes: %s", who, static_cast<unsigned long long>(size),
                              describe_address(*cluster.launch->memory, address).c_str()),
                       line);
    }
    return reinterpret_cast<uint8_t*>(address);
}

Cta& shared_target(Warp& w, uint32_t address, uint32_t size, bool cluster_allowed, int line,
                   uint32_t* offset) {
    Cluster& cluster = *w.cta->cluster;
    const uint32_t rank = address >> kRankShift;
    const uint32_t in_window = address & ((1u << kRankShift) - 1);
    if (rank != w.cta->rank && (!cluster_allowed || rank >= cluster.ctas.size())) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("shared address 0x%x is not in this CTA's shared memory", address), line);
    }
    Cta& cta = *cluster.ctas[rank];
    if (in_window < kSharedBase || in_window - kSharedBase + size > cta.shared.size()) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("shared address 0x%x + %u is outside the CTA's [0x%x, 0x%zx)", address, size,
                              kSharedBase, kSharedBase + cta.shared.size()),
                       line);
    }
    if (cta.warps_alive == 0) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("shared address 0x%x belongs to CTA rank %u, which has exited", address, rank),
                       line);
    }
    *offset = in_window - kSharedBase;
    return cta;
}

uint8_t* resolve(Warp& w, const Op& op, uint64_t address, uint32_t size, AccessKind kind, int lane) {
    if ((address & (size - 1)) != 0) {
        misaligned(address, size, lane, op.line);
    }
    switch (op.space) {
        case Space::kSharedCta:
            return resolve_shared(w, static_cast<uint32_t>(address), size, false, kind, op, lane);
        case Space::kSharedCluster:
            return resolve_shared(w, static_cast<uint32_t>(address), size, true, kind, op, lane);
        case Space::kLocal:
            return resolve_local(w, address, size, lane, op.line);
        case Space::kParam:
            return resolve_param(w, address, size, op.line);
        case Space::kGeneric:
            if (address >= kLocalWindow) {
                return resolve_local(w, address - kLocalWindow, size, lane, op.line);
            }
            if (address >= kSharedWindow) {
                return resolve_shared(w, static_cast<uint32_t>(address - kSharedWindow), size, true, kind, op,
                                      lane);
            }
            return resolve_global_lane(w, address, size, lane, op.line);
        default:
            return resolve_global_lane(w, address, size, lane, op.line);
    }
}

void lane_addresses(const Warp& w, const Op& op, uint64_t* addresses) {
    const uint64_t offset = static_cast<uint64_t>(op.imm);
    if (op.target2 != 0) {
        const uint64_t* a = source<uint64_t>(w, op.a);
        for (int i = 0; i < kLanes; ++i) {
            addresses[i] = a[i] + offset;
        }
        return;
    }
    const uint32_t* a = source<uint32_t>(w, op.a);
    for (int i = 0; i < kLanes; ++i) {
        addresses[i] = static_cast<uint32_t>(a[i] + static_cast<uint32_t>(offset));
    }
}

void resolve_lanes(Warp& w, const Op& op, uint32_t mask, uint32_t size, AccessKind kind, uint8_t** pointers) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    if (op.space == Space::kGlobal && mask == kAllLanes && is_one_run(addresses, size) &&
        known_run(*w.cta->cluster, addresses[0], size)) {
        for (int i = 0; i < kLanes; ++i) {
            pointers[i] = reinterpret_cast<uint8_t*>(addresses[i]);
        }
    } else {
        for (int i = 0; i < kLanes; ++i) {
            pointers[i] = in_mask(mask, i) ? resolve(w, op, addresses[i], size, kind, i) : nullptr;
        }
    }
    if (op.access == 0) {
        return;
    }
    w.loaded_since = true;
    check_global_lanes(w, op, mask, addresses, size);
    if (op.level == kWeak || !w.cta->cluster->launch->config.check_races) {
        return;
    }
    const bool shared = op.space == Space::kSharedCta || op.space == Space::kSharedCluster;
    std::shared_ptr<const Publication> own;
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        const uint64_t address = addresses[i] + (shared ? kSharedWindow : 0);
        if (kind != AccessKind::kWrite) {
            strong_read(w, op, address);
        }
        if (kind != AccessKind::kRead) {
            strong_write(w, op, address, kind == AccessKind::kAtomic, mask, own);
        }
    }
}

}  // namespace sim
