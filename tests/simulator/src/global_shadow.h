// What the checker remembers of global memory during a launch, and the check of every access to it.
//
// A word of four bytes has four cells; a cell is one access: who, when by that agent's own clock, which
// lane, which instruction, which bytes. A race is two accesses of one byte, one of them a write, that
// nothing orders and that are not both strong with scopes that reach the other's thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace sim {

// 21 + 18 + 5 + 16 + 4 bits; 0: none.
using Cell = uint64_t;

class GlobalShadow {
  public:
    static constexpr uint32_t kPageBytes = 4096;
    static constexpr uint32_t kCells = 4;
    using Word = std::array<Cell, kCells>;

    // An agent that touched global memory, for as long as the launch lasts.
    struct Agent {
        uint64_t cluster = 0;
        uint32_t agent = 0;  // in the cluster
        AgentInfo info{};
        Dim3 cta;
        std::shared_ptr<LaneAgents> lanes;
    };

    // The cells of the page that holds the address; global_shadow.cpp lays them out.
    Word* page(uint64_t address) {
        const uint64_t number = address / kPageBytes;
        Recent& recent = recent_[number % recent_.size()];
        if (recent.number != number) {
            recent = {number, find_page(number)};
        }
        return recent.words;
    }
    // The agent's number; 0 when there are too many to tell apart.
    uint32_t number_of(Cluster& cluster, uint32_t agent);
    const Agent& agent(uint32_t number) const { return agents_[number]; }

  private:
    struct Free {
        void operator()(Word* words) const;
    };
    struct Recent {
        uint64_t number = ~uint64_t{0};
        Word* words = nullptr;
    };
    Word* find_page(uint64_t number);

    std::vector<Agent> agents_{1};
    std::unordered_map<uint64_t, std::unique_ptr<Word, Free>> pages_;
    std::array<Recent, 256> recent_;
};

// An access that an engine makes, or a lane of a warp.
struct GlobalAccess {
    uint32_t agent, time, lane;
    uint16_t access;  // in Program::accesses
    bool async;       // of the async proxy
    const Order* order;
};
void check_global(Cluster& cluster, const GlobalAccess& access, uint64_t address, uint64_t bytes);
// Those of a warp; lanes whose address is not in global memory do not count.
void check_global_lanes(Warp& warp, const Op& op, uint32_t mask, const uint64_t* addresses, uint32_t bytes);

}  // namespace sim
