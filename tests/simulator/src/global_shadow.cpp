#include "global_shadow.h"

#include <cstring>
#include <mutex>

#include "launch.h"

namespace sim {
namespace {

constexpr uint32_t kMostAgents = (1u << 21) - 1;
constexpr size_t kMostAccesses = 1u << 16;
constexpr size_t kSlabBytes = size_t{1} << 20;
constexpr size_t kMostSlabs = 256;  // that are kept

// Slabs outlive a launch: fresh memory costs the system more than the check of what it holds.
struct SlabPool {
    std::mutex mutex;
    std::vector<std::unique_ptr<uint8_t[]>> slabs;
};
SlabPool& pool() {
    static SlabPool& the_pool = *new SlabPool;  // for shadows that live until the process ends
    return the_pool;
}

std::unique_ptr<uint8_t[]> take_slab() {
    SlabPool& from = pool();
    const std::lock_guard<std::mutex> lock(from.mutex);
    if (from.slabs.empty()) {
        return std::unique_ptr<uint8_t[]>(new uint8_t[kSlabBytes]);
    }
    auto slab = std::move(from.slabs.back());
    from.slabs.pop_back();
    return slab;
}

}  // namespace

GlobalShadow::~GlobalShadow() {
    SlabPool& to = pool();
    const std::lock_guard<std::mutex> lock(to.mutex);
    while (!slabs_.empty() && to.slabs.size() < kMostSlabs) {
        to.slabs.push_back(std::move(slabs_.back()));
        slabs_.pop_back();
    }
}

void* GlobalShadow::zeros(size_t bytes) {
    if (slabs_.empty() || slab_used_ + bytes > kSlabBytes) {
        slabs_.push_back(take_slab());
        slab_used_ = 0;
    }
    void* result = slabs_.back().get() + slab_used_;
    slab_used_ += bytes;
    std::memset(result, 0, bytes);
    return result;
}

GlobalShadow::Page* GlobalShadow::find_page(uint64_t number) {
    Page*& page = pages_[number];
    if (page == nullptr) {
        page = static_cast<Page*>(zeros(sizeof(Page)));
    }
    return page;
}

void GlobalShadow::divide(Page& page, uint32_t granule, uint32_t part_bytes) {
    Unit* old = page.parts[granule];
    const uint32_t old_bytes = old == nullptr ? kGranuleBytes : page.part_bytes[granule];
    if (old_bytes <= part_bytes) {
        return;
    }
    old = old == nullptr ? &page.granules[granule] : old;
    Unit* parts = static_cast<Unit*>(zeros(kGranuleBytes / part_bytes * sizeof(Unit)));
    for (uint32_t at = 0; at < kGranuleBytes; at += part_bytes) {
        const uint32_t inside = at % old_bytes;
        Unit& part = parts[at / part_bytes];
        part = old[at / old_bytes];
        for (Cell& cell : part) {
            const uint32_t lane_bytes = lane_bytes_[access_of(cell)];
            if (cell != 0 && lane_bytes != 0) {
                cell += Cell{inside / lane_bytes} << 20;
            }
        }
    }
    page.parts[granule] = parts;
    page.part_bytes[granule] = static_cast<uint8_t>(part_bytes);
}

bool GlobalShadow::has_room(const Kernel& kernel) const {
    return kernels_.size() < 64 && infos_.size() + kernel.program.accesses.size() <= kMostAccesses;
}

uint32_t GlobalShadow::add_grid(const Kernel& kernel) {
    const std::vector<GlobalAccessInfo>& fresh = kernel.program.accesses;
    const uint32_t first = static_cast<uint32_t>(infos_.size());
    infos_.insert(infos_.end(), fresh.begin(), fresh.end());
    lane_bytes_.resize(infos_.size(), 0);
    kernels_.push_back(kernel.name);
    return first;
}

uint32_t GlobalShadow::number_of(Cluster& cluster, uint32_t agent) {
    std::vector<uint32_t>& numbers = cluster.global_agents;
    if (numbers.size() <= agent) {
        numbers.resize(agent + 1, 0);
    }
    if (numbers[agent] == 0 && agents_.size() < kMostAgents) {
        Agent fresh;
        fresh.cluster = cluster.ordinal;
        fresh.grid = cluster.launch->grid_number;
        fresh.agent = agent;
        fresh.info = cluster.agent_infos[agent];
        const Cta& cta = *cluster.ctas[fresh.info.rank];
        fresh.cta = cta.index;
        if (fresh.info.kind == AgentKind::kWarp) {
            fresh.lanes = cta.warps[fresh.info.index].lane_agents;
        }
        numbers[agent] = static_cast<uint32_t>(agents_.size());
        agents_.push_back(std::move(fresh));
    }
    return numbers[agent];
}

}  // namespace sim
