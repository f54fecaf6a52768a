// What the checker remembers of global memory during a launch, and the check of every access to it.
//
// A unit of memory has four cells; a cell is one access: who, when by that agent's own clock, which
// lane, which instruction, which bytes. A race is two accesses of one byte, one of them a write, that
// nothing orders and that are not both strong with scopes that reach the other's thread.
//
// Units are granules of 64 bytes as long as all accesses are of whole ones, then chunks of 16 bytes or
// words of 4. The cell of a unit that several lanes share has the lane of its first byte.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace sim {

// 21 + 18 + 5 + 16 + 4 bits; 0: none. The bytes are those of a word; of a larger unit all.
using Cell = uint64_t;

class GlobalShadow {
  public:
    static constexpr uint32_t kPageBytes = 4096, kGranuleBytes = 64, kChunkBytes = 16, kWordBytes = 4;
    static constexpr uint32_t kGranules = kPageBytes / kGranuleBytes;
    static constexpr uint32_t kCells = 4;
    using Unit = std::array<Cell, kCells>;

    struct Page {
        Unit granules[kGranules];
        Unit* parts[kGranules];         // null: whole
        uint8_t part_bytes[kGranules];  // kChunkBytes or kWordBytes
    };

    // An agent that touched global memory, for as long as the shadow lasts.
    struct Agent {
        uint64_t cluster = 0;
        uint32_t grid = 0;   // in the chain
        uint32_t agent = 0;  // in the cluster
        AgentInfo info{};
        Dim3 cta;
        std::shared_ptr<LaneAgents> lanes;
    };

    GlobalShadow() = default;
    ~GlobalShadow();
    GlobalShadow(const GlobalShadow&) = delete;
    GlobalShadow& operator=(const GlobalShadow&) = delete;

    // The grids of a chain of launches (grid_chain.h) have a shadow together. add_grid gives the number of
    // the kernel's first access among all.
    bool has_room(const Kernel& kernel) const;
    uint32_t add_grid(const Kernel& kernel);
    uint32_t grids() const { return static_cast<uint32_t>(kernels_.size()); }
    const std::string& kernel_of(const Agent& agent) const { return kernels_[agent.grid]; }
    const GlobalAccessInfo& info(uint32_t access) const { return infos_[access]; }

    Page& page(uint64_t address) {
        const uint64_t number = address / kPageBytes;
        Recent& recent = recent_[number % recent_.size()];
        if (recent.number != number) {
            recent = {number, find_page(number)};
        }
        return *recent.page;
    }
    // Divides a granule into parts of so many bytes.
    void divide(Page& page, uint32_t granule, uint32_t part_bytes);

    // The agent's number; 0 when there are too many to tell apart.
    uint32_t number_of(Cluster& cluster, uint32_t agent);
    const Agent& agent(uint32_t number) const { return agents_[number]; }

    // Bytes of a lane's access; 0 for an engine's, which has no lanes.
    uint32_t lane_bytes(uint32_t access) const { return lane_bytes_[access]; }
    void set_lane_bytes(uint32_t access, uint32_t bytes) {
        lane_bytes_[access] = static_cast<uint8_t>(bytes);
    }
    // Its own, so that the check does not change the schedule.
    uint32_t random() {
        random_state_ = random_state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(random_state_ >> 33);
    }

  private:
    struct Recent {
        uint64_t number = ~uint64_t{0};
        Page* page = nullptr;
    };
    Page* find_page(uint64_t number);
    void* zeros(size_t bytes);

    std::vector<Agent> agents_{1};
    std::vector<std::string> kernels_;  // names, by grid
    std::vector<GlobalAccessInfo> infos_;
    std::vector<uint8_t> lane_bytes_;
    std::unordered_map<uint64_t, Page*> pages_;
    std::array<Recent, 256> recent_;
    std::vector<std::unique_ptr<uint8_t[]>> slabs_;
    size_t slab_used_ = 0;
    uint64_t random_state_ = 1;
};

inline uint32_t who_of(Cell cell) {
    return static_cast<uint32_t>(cell >> 43);
}
inline uint32_t lane_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell >> 20) & 31u;
}
inline uint32_t access_of(Cell cell) {
    return static_cast<uint32_t>(cell >> 4) & 0xffffu;
}
inline uint32_t bytes_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell) & 0xfu;
}
constexpr uint32_t kMostCellTime = (1u << 18) - 1;
constexpr Cell kLaneBits = Cell{31} << 20, kByteBits = 0xf;
inline uint32_t time_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell >> 25) & kMostCellTime;
}
inline Cell make_cell(uint32_t who, uint32_t time, uint32_t lane, uint32_t access) {
    return uint64_t{who} << 43 | uint64_t{time < kMostCellTime ? time : kMostCellTime} << 25 |
           uint64_t{lane} << 20 | uint64_t{access} << 4;
}

// An access that an engine makes, or a warp.
struct GlobalAccess {
    uint32_t agent, time;
    uint16_t access;  // in Program::accesses
    bool async;       // of the async proxy
    const Order* order;
};
void check_global(Cluster& cluster, const GlobalAccess& access, uint64_t address, uint64_t bytes);
// Those of a warp; lanes whose address is not in global memory do not count.
void check_global_lanes(Warp& warp, const Op& op, uint32_t mask, const uint64_t* addresses, uint32_t bytes);

}  // namespace sim
