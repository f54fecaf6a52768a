#include "global_shadow.h"

#include <algorithm>
#include <cstdlib>

#include "checker.h"
#include "errors.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

constexpr uint32_t kMostAgents = (1u << 21) - 1;
constexpr uint32_t kMostTime = (1u << 18) - 1;

Cell make_cell(uint32_t who, uint32_t time, uint32_t lane, uint32_t access, uint32_t bytes) {
    return uint64_t{who} << 43 | uint64_t{std::min(time, kMostTime)} << 25 | uint64_t{lane} << 20 |
           uint64_t{access} << 4 | bytes;
}
uint32_t who_of(Cell cell) {
    return static_cast<uint32_t>(cell >> 43);
}
uint32_t time_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell >> 25) & kMostTime;
}
uint32_t lane_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell >> 20) & 31u;
}
uint32_t access_of(Cell cell) {
    return static_cast<uint32_t>(cell >> 4) & 0xffffu;
}
uint32_t bytes_of_cell(Cell cell) {
    return static_cast<uint32_t>(cell) & 0xfu;
}

// A page has cells for every 16 bytes as long as all accesses are of whole such chunks, and from then on for
// every word: a flag, the chunks' cells, the words' cells.
constexpr uint64_t kChunkBytes = 16;
constexpr uint64_t kCoarse = 1, kFine = kCoarse + GlobalShadow::kPageBytes / kChunkBytes;
constexpr uint64_t kPageWords = kFine + GlobalShadow::kPageBytes / 4;

bool is_fine(const GlobalShadow::Word* page) {
    return page[0][0] != 0;
}

void refine(GlobalShadow::Word* page) {
    if (is_fine(page)) {
        return;
    }
    page[0][0] = 1;
    for (uint64_t i = 0; i < GlobalShadow::kPageBytes / 4; ++i) {
        page[kFine + i] = page[kCoarse + i * 4 / kChunkBytes];
    }
}

// The check of one instruction's, or one transfer's, accesses.
class Check {
  public:
    // `store`: the ordinary store of `warp` that makes the access, if it is one.
    Check(Cluster& cluster, const GlobalAccess& access, const Warp* warp = nullptr, const Op* store = nullptr)
        : warp_(warp),
          store_(store),
          cluster_(cluster),
          shadow_(*cluster.launch->global),
          access_(access),
          program_(cluster.launch->kernel->program),
          info_(program_.accesses[access.access]),
          who_(shadow_.number_of(cluster, access.agent)) {}

    void run(uint64_t address, uint64_t bytes, uint32_t lane) {
        if (who_ == 0) {
            return;
        }
        const uint64_t end = address + bytes;
        lane_ = lane;
        first_ = address;
        const Cell whole = make_cell(who_, access_.time, lane, access_.access, 0);
        while (address < end) {
            GlobalShadow::Word* page = shadow_.page(address);
            const uint64_t page_end = (address / GlobalShadow::kPageBytes + 1) * GlobalShadow::kPageBytes;
            const uint64_t stop = std::min(end, page_end);
            if (((address | stop) & (kChunkBytes - 1)) == 0 && !is_fine(page)) {
                for (; address < stop; address += kChunkBytes) {
                    touch(page[kCoarse + address % GlobalShadow::kPageBytes / kChunkBytes], whole | 0xf,
                          address);
                }
                continue;
            }
            refine(page);
            while (address < stop) {
                const uint64_t next = std::min(stop, (address & ~uint64_t{3}) + 4);
                const uint32_t mask = ((1u << (next - address)) - 1) << (address & 3);
                touch(page[kFine + address % GlobalShadow::kPageBytes / 4], whole | mask, address);
                address = next;
            }
        }
    }

  private:
    const GlobalAccessInfo& info_of(Cell cell) const { return program_.accesses[access_of(cell)]; }

    void touch(GlobalShadow::Word& word, Cell mine, uint64_t address) {
        const uint32_t bytes = bytes_of_cell(mine);
        int slot = -1;
        for (uint32_t i = 0; i < GlobalShadow::kCells; ++i) {
            const Cell cell = word[i];
            if (cell == mine) {
                return;
            }
            if (cell == 0) {
                slot = slot < 0 ? static_cast<int>(i) : slot;
                continue;
            }
            if ((bytes_of_cell(cell) & bytes) == 0) {
                continue;
            }
            const bool writes = info_of(cell).writes;
            const bool before = writes || info_.writes ? require_order(cell, address) : who_of(cell) == who_;
            // Who is ordered with mine is ordered with what mine replaces.
            if (before && (bytes_of_cell(cell) & ~bytes) == 0 && (info_.writes || !writes)) {
                word[i] = 0;
                slot = static_cast<int>(i);
            }
        }
        word[slot >= 0 ? static_cast<uint32_t>(slot) : victim(word)] = mine;
    }

    // All cells are taken: a load makes room rather than a store.
    uint32_t victim(const GlobalShadow::Word& word) {
        const uint32_t first = static_cast<uint32_t>(cluster_.random()) % GlobalShadow::kCells;
        for (uint32_t i = 0; i < GlobalShadow::kCells; ++i) {
            const uint32_t at = (first + i) % GlobalShadow::kCells;
            if (!info_of(word[at]).writes) {
                return at;
            }
        }
        return first;
    }

    // True when the cell's access happened before; an error when it should have.
    bool require_order(Cell cell, uint64_t address) {
        if (cell >> 4 == seen_ >> 4) {
            return seen_ordered_;
        }
        const GlobalShadow::Agent& other = shadow_.agent(who_of(cell));
        const bool of_warp = other.info.kind == AgentKind::kWarp;
        const Moment moment{other.agent, time_of_cell(cell),    lane_of_cell(cell),
                            of_warp,     !info_of(cell).writes, other.lanes.get()};
        const bool near = other.cluster == cluster_.ordinal;
        const bool same = who_of(cell) == who_ && (of_warp || moment.time == access_.time);
        const Clock* clock = near ? &access_.order->clock : find_far(access_.order->far, other.cluster);
        const bool ordered = same || (clock != nullptr && known(*clock, moment));
        if (!ordered && !both_strong(cell, other)) {
            if (!info_of(cell).writes || !stores_the_same()) {
                report_race(cell, other, address);
            }
            return false;
        }
        if (ordered && access_.async && of_warp && info_of(cell).writes) {
            const Clock* proxy =
                near ? &access_.order->global_proxy : find_far(access_.order->far_proxy, other.cluster);
            if (proxy == nullptr || !known(*proxy, moment)) {
                report_proxy(cell, other, address);
            }
        }
        seen_ = cell;
        seen_ordered_ = ordered;
        return ordered;
    }

    bool both_strong(Cell cell, const GlobalShadow::Agent& other) const {
        const Level level = std::min(info_of(cell).level, info_.level);
        const bool same_cluster = other.cluster == cluster_.ordinal;
        const bool same_cta = same_cluster && other.info.rank == cluster_.agent_infos[access_.agent].rank;
        return level >= (same_cta ? kCtaLevel : same_cluster ? kClusterLevel : kGpuLevel);
    }

    // What the lane stores lies there already: whoever wrote it, nobody can tell which store came last.
    bool stores_the_same() const {
        if (store_ == nullptr) {
            return false;
        }
        const uint32_t* registers = warp_->program->lists.data() + store_->list;
        const uint8_t* memory = reinterpret_cast<const uint8_t*>(first_);
        for (uint32_t e = 0; e < store_->list_size; ++e) {
            const uint8_t* value = source<uint8_t>(*warp_, registers[e]) + lane_ * store_->code2;
            if (std::memcmp(value, memory + e * store_->code, store_->code) != 0) {
                return false;
            }
        }
        return true;
    }

    std::string name_of(const GlobalShadow::Agent& agent) const {
        return describe_agent(agent.info, false) +
               format(" of CTA (%u, %u, %u)", agent.cta.x, agent.cta.y, agent.cta.z);
    }

    std::string name_of(uint64_t address) const {
        std::string text = format("global memory 0x%llx", static_cast<unsigned long long>(address));
        const MemoryRange* range = find_range(*cluster_.launch->memory, address);
        if (range != nullptr) {
            text += format(" (byte %llu of %s)", static_cast<unsigned long long>(address - range->begin),
                           range->what.c_str());
        }
        return text;
    }

    [[noreturn]] void report_race(Cell cell, const GlobalShadow::Agent& other, uint64_t address) {
        const bool strong = info_of(cell).level != kWeak || info_.level != kWeak;
        throw SimError(
            ErrorKind::kRace,
            format(
                "%s is %s by %s (PTX line %d) and %s by %s (PTX line %d) with nothing that orders the two%s",
                name_of(address).c_str(), info_of(cell).writes ? "written" : "read", name_of(other).c_str(),
                info_of(cell).line, info_.writes ? "written" : "read", name_of(shadow_.agent(who_)).c_str(),
                info_.line, strong ? " (they are not both strong with a scope that reaches the other)" : ""),
            info_.line);
    }

    [[noreturn]] void report_proxy(Cell cell, const GlobalShadow::Agent& other, uint64_t address) {
        throw SimError(
            ErrorKind::kProxyFence,
            format("%s was written by %s (PTX line %d, generic proxy) and is %s by %s (PTX line %d, async "
                   "proxy) without fence.proxy.async in between",
                   name_of(address).c_str(), name_of(other).c_str(), info_of(cell).line,
                   info_.writes ? "written" : "read", name_of(shadow_.agent(who_)).c_str(), info_.line),
            info_.line);
    }

    const Warp* warp_;
    const Op* store_;
    uint32_t lane_ = 0;
    uint64_t first_ = 0;  // the lane's address
    Cluster& cluster_;
    GlobalShadow& shadow_;
    const GlobalAccess& access_;
    const Program& program_;
    const GlobalAccessInfo& info_;
    uint32_t who_;
    Cell seen_ = 0;  // the last that was looked at: neighbouring words mostly share their history
    bool seen_ordered_ = false;
};

}  // namespace

void GlobalShadow::Free::operator()(Word* words) const {
    std::free(words);
}

GlobalShadow::Word* GlobalShadow::find_page(uint64_t number) {
    std::unique_ptr<Word, Free>& page = pages_[number];
    if (!page) {
        page.reset(static_cast<Word*>(std::calloc(kPageWords, sizeof(Word))));
    }
    return page.get();
}

uint32_t GlobalShadow::number_of(Cluster& cluster, uint32_t agent) {
    std::vector<uint32_t>& numbers = cluster.global_agents;
    if (numbers.size() <= agent) {
        numbers.resize(agent + 1, 0);
    }
    if (numbers[agent] == 0 && agents_.size() < kMostAgents) {
        Agent fresh;
        fresh.cluster = cluster.ordinal;
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

void check_global(Cluster& cluster, const GlobalAccess& access, uint64_t address, uint64_t bytes) {
    if (cluster.launch->global) {
        Check(cluster, access).run(address, bytes, access.lane);
    }
}

void check_global_lanes(Warp& w, const Op& op, uint32_t mask, const uint64_t* addresses, uint32_t bytes) {
    const GlobalAccess access{w.agent, w.order.clock[w.agent], 0, op.access, false, &w.order};
    const bool stores = op.op_class == OpClass::kStoreGlobal;
    Check check(*w.cta->cluster, access, &w, stores ? &op : nullptr);
    const bool shared = op.space == Space::kSharedCta || op.space == Space::kSharedCluster;
    for (int i = 0; i < kLanes; ++i) {
        if (in_mask(mask, i) && !shared && addresses[i] < kSharedWindow) {
            check.run(addresses[i], bytes, static_cast<uint32_t>(i));
        }
    }
    w.loaded_since = true;
}

}  // namespace sim
