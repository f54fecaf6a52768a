// One kernel launch: what to run, over which grid, with which arguments and choices.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <new>

#include "errors.h"
#include "global_shadow.h"
#include "machine.h"
#include "memory_map.h"
#include "statistics.h"

namespace sim {

// Parameters hold tensor maps, which must be aligned to 64 bytes.
template <class T>
struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <class U>
    AlignedAllocator(const AlignedAllocator<U>&) {}
    T* allocate(size_t count) {
        return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
    }
    void deallocate(T* pointer, size_t) { ::operator delete(pointer, std::align_val_t{64}); }
    bool operator==(const AlignedAllocator&) const { return true; }
    bool operator!=(const AlignedAllocator&) const { return false; }
};
using ParamBytes = std::vector<uint8_t, AlignedAllocator<uint8_t>>;

struct Launch {
    const Kernel* kernel = nullptr;
    Dim3 grid, block, cluster;
    uint32_t dynamic_shared = 0;
    ParamBytes params;
    Config config;
    std::shared_ptr<const MemorySnapshot> memory;

    bool adversarial = false;
    uint32_t quantum = 4096;   // warp instructions that a warp runs at a time, at most
    uint64_t slice = 250'000;  // those of a cluster before another resident one has its turn, at most

    // Global memory between CTAs; absent where it is not checked. SyncTable: its strong accesses.
    std::shared_ptr<GlobalShadow> global;
    SyncTable sync;
    // Its place in a chain of launches that may overlap (grid_chain.h).
    uint64_t first_cluster = 0;
    uint32_t first_access = 0;
    uint64_t earlier_grids = 0;  // what griddepcontrol.wait waits for
    std::atomic<bool> waited_for_earlier{false};

    std::mutex mutex;  // of what follows
    std::atomic<uint64_t> next_cluster{0};
    Statistics statistics;
    std::vector<TimelineEvent> timeline;
    std::string error;  // first finding, ready to print
    ErrorKind error_kind = ErrorKind::kTrap;
    std::atomic<bool> failed{false};

    uint64_t cluster_count() const { return grid.count() / cluster.count(); }
    uint32_t warps_per_cta() const { return static_cast<uint32_t>((block.count() + 31) / 32); }
};

// Runs the launch to its end. False when a check failed; launch.error says how.
bool run_launch(Launch& launch);

}  // namespace sim
