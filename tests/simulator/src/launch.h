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
    uint32_t quantum = 4096;  // warp instructions that a warp runs at a time, at most
    bool late_dependents =
        false;                 // a grid begins when the one before it has ended, as the device may have it
    uint64_t slice = 250'000;  // those of a cluster before another resident one has its turn, at most

    // Global memory between CTAs; absent where it is not checked. SyncTable: its strong accesses.
    std::shared_ptr<GlobalShadow> global;
    std::shared_ptr<SyncTable> sync;
    // Its place in a chain of launches that may overlap (grid_chain.h).
    uint32_t grid_number = 0;
    uint64_t first_cluster = 0;
    uint32_t first_access = 0;
    uint64_t earlier_grids = 0;            // that had ended when it was launched
    const Launch* prerequisite = nullptr;  // the one before it, which runs together with it
    std::atomic<bool> waited_for_earlier{false};
    std::atomic<uint64_t> allowing_ctas{0};  // have ended, or issued griddepcontrol.launch_dependents
    std::atomic<uint64_t> ended_clusters{0};
    uint64_t cluster_share = 0;  // what a resident cluster takes of the device, see launch.cpp

    std::mutex mutex;  // of what follows
    std::atomic<uint64_t> next_cluster{0};
    Statistics statistics;
    std::vector<TimelineEvent> timeline;
    std::string error;  // first finding, ready to print
    ErrorKind error_kind = ErrorKind::kTrap;
    std::atomic<bool> failed{false};

    uint64_t cluster_count() const { return grid.count() / cluster.count(); }
    bool may_begin() const {
        return late_dependents
                   ? earlier_complete()
                   : prerequisite == nullptr || prerequisite->allowing_ctas == prerequisite->grid.count();
    }
    // What griddepcontrol.wait waits for: a grid is complete after those before it.
    bool earlier_complete() const {
        return prerequisite == nullptr || (prerequisite->ended_clusters == prerequisite->cluster_count() &&
                                           prerequisite->earlier_complete());
    }
    uint32_t warps_per_cta() const { return static_cast<uint32_t>((block.count() + 31) / 32); }
};

// Runs the launches to their end: one, or several of which each is the prerequisite of the next and may
// overlap with it. False when a check failed; `error` of the one it happened in says how.
bool run_launches(const std::vector<Launch*>& launches);

}  // namespace sim
