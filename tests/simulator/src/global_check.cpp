// The check of an access of global memory against what its shadow remembers.
#include <algorithm>
#include <cstring>
#include <optional>

#include "address.h"
#include "checker.h"
#include "errors.h"
#include "global_shadow.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

constexpr uint32_t kGranule = GlobalShadow::kGranuleBytes, kChunk = GlobalShadow::kChunkBytes,
                   kWord = GlobalShadow::kWordBytes;

std::string name_of_address(const Cluster& cluster, uint64_t address) {
    std::string text = format("global memory 0x%llx", static_cast<unsigned long long>(address));
    const MemoryRange* range = find_range(*cluster.launch->memory, address);
    if (range != nullptr) {
        text += format(" (byte %llu of %s)", static_cast<unsigned long long>(address - range->begin),
                       range->what.c_str());
    }
    return text;
}

std::string name_of_agent(const AgentInfo& info, const Dim3& cta) {
    return describe_agent(info, false) + format(" of CTA (%u, %u, %u)", cta.x, cta.y, cta.z);
}

// Nobody may read what neither the host nor a kernel has written.
void check_written(Cluster& cluster, const GlobalAccess& access, uint64_t address, uint64_t bytes) {
    if (!cluster.launch->config.check_uninitialized_global) {
        return;
    }
    const MemoryRange* range = cluster.last_range;
    if (range == nullptr || address < range->begin || address >= range->end) {
        range = find_range(*cluster.launch->memory, address);
    }
    if (range == nullptr || !range->written) {
        return;
    }
    const uint64_t end = std::min(address + bytes, range->end);
    const GlobalAccessInfo& info = cluster.launch->kernel->program.accesses[access.access];
    const uint64_t missing = info.reads ? range->written->first_unwritten(address, end - address) : end;
    if (missing != end) {
        const AgentInfo& agent = cluster.agent_infos[access.agent];
        throw SimError(
            ErrorKind::kUninitialized,
            format("%s is read by %s (PTX line %d), but neither the host nor a kernel has written it",
                   name_of_address(cluster, missing).c_str(),
                   name_of_agent(agent, cluster.ctas[agent.rank]->index).c_str(), info.line),
            info.line);
    }
    if (info.writes) {
        range->written->set(address, end - address, true);
    }
}

// What a cell's access is to mine. kLanes: that takes telling the lanes of the unit apart.
enum class Verdict : uint8_t { kBefore, kApart, kLanes };

// The check of one instruction's, or one transfer's, accesses.
class Check {
  public:
    // `warp`: whose accesses they are, `lane_bytes` of each lane; `store`: the ordinary store that makes
    // them.
    Check(Cluster& cluster, const GlobalAccess& access, const Warp* warp = nullptr, uint32_t lane_bytes = 0,
          const Op* store = nullptr)
        : warp_(warp),
          store_(store),
          lane_bytes_(lane_bytes),
          cluster_(cluster),
          shadow_(*cluster.launch->global),
          access_(access),
          number_(cluster.launch->first_access + access.access),
          info_(shadow_.info(number_)),
          who_(shadow_.number_of(cluster, access.agent)),
          cell_(make_cell(who_, access.time, 0, number_)) {
        if (lane_bytes != 0) {
            shadow_.set_lane_bytes(number_, lane_bytes);
        }
    }

    // Consecutive lanes, from `lane` on, have consecutive addresses.
    void run(uint64_t address, uint64_t bytes, uint32_t lane) {
        if (who_ == 0) {
            return;
        }
        first_ = address;
        first_lane_ = lane;
        const uint64_t end = address + bytes;
        while (address < end) {
            GlobalShadow::Page& page = shadow_.page(address);
            const uint64_t page_end = (address / GlobalShadow::kPageBytes + 1) * GlobalShadow::kPageBytes;
            const uint64_t stop = std::min(end, page_end);
            while (address < stop) {
                const uint64_t next = std::min(stop, (address & ~uint64_t{kGranule - 1}) + kGranule);
                const uint32_t granule = static_cast<uint32_t>(address % GlobalShadow::kPageBytes / kGranule);
                const bool whole = next - address == kGranule && page.parts[granule] == nullptr;
                if (!whole || is_below_word() ||
                    !touch(page.granules[granule], cell_at(address) | kByteBits, kGranule, address)) {
                    run_parts(page, granule, address, next);
                }
                address = next;
            }
        }
    }

  private:
    const GlobalAccessInfo& info_of(Cell cell) const { return shadow_.info(access_of(cell)); }
    // Lanes that share a word are told apart by its bytes.
    bool is_below_word() const { return lane_bytes_ != 0 && lane_bytes_ < kWord; }
    uint32_t lane_at(uint64_t address) const {
        return lane_bytes_ == 0 ? 0 : first_lane_ + static_cast<uint32_t>((address - first_) / lane_bytes_);
    }
    Cell cell_at(uint64_t address) const { return cell_ | Cell{lane_at(address)} << 20; }

    // Part of a granule, or one that is divided.
    void run_parts(GlobalShadow::Page& page, uint32_t granule, uint64_t address, uint64_t end) {
        const bool chunks = ((address | end) & (kChunk - 1)) == 0 && !is_below_word();
        shadow_.divide(page, granule, chunks ? kChunk : kWord);
        if (page.part_bytes[granule] == kChunk) {
            while (address < end && touch(page.parts[granule][address % kGranule / kChunk],
                                          cell_at(address) | kByteBits, kChunk, address)) {
                address += kChunk;
            }
            if (address == end) {
                return;
            }
            shadow_.divide(page, granule, kWord);
        }
        while (address < end) {
            uint64_t next = std::min(end, (address & ~uint64_t{kWord - 1}) + kWord);
            next = is_below_word() ? std::min(next, address + lane_bytes_) : next;
            const uint32_t mask = ((1u << (next - address)) - 1) << (address & 3);
            touch(page.parts[granule][address % kGranule / kWord], cell_at(address) | mask, kWord, address);
            address = next;
        }
    }

    // False, and nothing done, when the unit must be divided first.
    bool touch(GlobalShadow::Unit& unit, Cell mine, uint32_t unit_bytes, uint64_t address) {
        if (unit[0] == mine || unit[1] == mine || unit[2] == mine || unit[3] == mine) {
            return true;
        }
        const Cell bytes = mine & kByteBits;
        uint32_t replaced = 0;
        int slot = -1;
        for (uint32_t i = 0; i < GlobalShadow::kCells; ++i) {
            const Cell cell = unit[i];
            if (cell == 0) {
                slot = slot < 0 ? static_cast<int>(i) : slot;
                continue;
            }
            if ((cell & bytes) == 0) {
                continue;
            }
            const bool writes = info_of(cell).writes;
            bool before = who_of(cell) == who_;
            if (writes || info_.writes) {
                const Verdict verdict = require_order(cell, unit_bytes, address);
                if (verdict == Verdict::kLanes) {
                    return false;
                }
                before = verdict == Verdict::kBefore;
            }
            // Who is ordered with mine is ordered with what mine replaces.
            if (before && (cell & kByteBits & ~bytes) == 0 && (info_.writes || !writes)) {
                replaced |= 1u << i;
                slot = static_cast<int>(i);
            }
        }
        for (uint32_t i = 0; replaced != 0; ++i, replaced >>= 1) {
            unit[i] = (replaced & 1) != 0 ? 0 : unit[i];
        }
        unit[slot >= 0 ? static_cast<uint32_t>(slot) : victim(unit)] = mine;
        return true;
    }

    // All cells are taken: a load makes room rather than a store.
    uint32_t victim(const GlobalShadow::Unit& unit) {
        const uint32_t first = shadow_.random() % GlobalShadow::kCells;
        for (uint32_t i = 0; i < GlobalShadow::kCells; ++i) {
            const uint32_t at = (first + i) % GlobalShadow::kCells;
            if (!info_of(unit[at]).writes) {
                return at;
            }
        }
        return first;
    }

    // Whether the cell's access happened before; an error when it should have.
    Verdict require_order(Cell cell, uint32_t unit_bytes, uint64_t address) {
        if (((cell ^ seen_) & ~(kLaneBits | kByteBits)) == 0) {
            return Verdict::kBefore;
        }
        const GlobalShadow::Agent& other = shadow_.agent(who_of(cell));
        const bool of_warp = other.info.kind == AgentKind::kWarp;
        const bool writes = info_of(cell).writes;
        const bool near = other.cluster == cluster_.ordinal;
        Moment moment{other.agent, time_of_cell(cell), lane_of_cell(cell), of_warp,
                      !writes,     other.lanes.get()};
        const bool finished = ((access_.order->grids >> other.grid) & 1) != 0;
        const bool same = finished || (who_of(cell) == who_ && (of_warp || moment.time == access_.time));
        const Clock* clock = near ? &access_.order->clock : find_far(access_.order->far, other.cluster);
        const Clock* proxy = nullptr;
        const bool needs_proxy = access_.async && of_warp && writes && !finished;
        if (needs_proxy) {
            proxy = near ? &access_.order->global_proxy : find_far(access_.order->far_proxy, other.cluster);
        }
        const auto in_order = [&] { return same || (clock != nullptr && known(*clock, moment)); };
        const auto fenced = [&] { return !needs_proxy || (proxy != nullptr && known(*proxy, moment)); };
        moment.lanes = nullptr;  // what holds for all lanes comes first
        if (in_order() && fenced()) {
            seen_ = cell;
            return Verdict::kBefore;
        }
        if (unit_bytes != kWord && (spreads(cell, unit_bytes) || spreads(cell_, unit_bytes))) {
            return Verdict::kLanes;
        }
        moment.lanes = other.lanes.get();
        if (!in_order()) {
            if (!both_strong(cell, other) && (!writes || !stores_the_same(address))) {
                report_race(cell, other, address);
            }
            return Verdict::kApart;
        }
        if (!fenced()) {
            report_proxy(cell, other, address);
        }
        return Verdict::kBefore;
    }

    // Over several lanes.
    bool spreads(Cell cell, uint32_t unit_bytes) const {
        const uint32_t lane_bytes = shadow_.lane_bytes(access_of(cell));
        return lane_bytes != 0 && lane_bytes < unit_bytes;
    }

    bool both_strong(Cell cell, const GlobalShadow::Agent& other) const {
        const Level level = std::min(info_of(cell).level, info_.level);
        const bool same_cluster = other.cluster == cluster_.ordinal;
        const bool same_cta = same_cluster && other.info.rank == cluster_.agent_infos[access_.agent].rank;
        return level >= (same_cta ? kCtaLevel : same_cluster ? kClusterLevel : kGpuLevel);
    }

    // What the lane stores lies there already: whoever wrote it, nobody can tell which store came last.
    bool stores_the_same(uint64_t address) const {
        if (store_ == nullptr) {
            return false;
        }
        const uint32_t lane = lane_at(address);
        const uint32_t* registers = warp_->program->lists.data() + store_->list;
        const uint8_t* memory =
            reinterpret_cast<const uint8_t*>(first_ + uint64_t{lane - first_lane_} * lane_bytes_);
        for (uint32_t e = 0; e < store_->list_size; ++e) {
            const uint8_t* value = source<uint8_t>(*warp_, registers[e]) + lane * store_->code2;
            if (std::memcmp(value, memory + e * store_->code, store_->code) != 0) {
                return false;
            }
        }
        return true;
    }

    std::string name_of(const GlobalShadow::Agent& agent) const {
        const std::string& kernel = shadow_.kernel_of(agent);
        const uint32_t mine = shadow_.agent(who_).grid;
        const char* when = agent.grid < mine ? "earlier" : "later";
        return name_of_agent(agent.info, agent.cta) +
               (agent.grid == mine ? std::string() : format(" of the %s kernel %s", when, kernel.c_str()));
    }
    std::string name_of(uint64_t address) const { return name_of_address(cluster_, address); }

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
    uint32_t lane_bytes_;
    uint64_t first_ = 0;  // of the run: its address
    uint32_t first_lane_ = 0;
    Cluster& cluster_;
    GlobalShadow& shadow_;
    const GlobalAccess& access_;
    uint32_t number_;  // of the access
    const GlobalAccessInfo& info_;
    uint32_t who_;
    Cell cell_;      // mine, without lane and bytes
    Cell seen_ = 0;  // the last that was in order whatever the lane: neighbours mostly share their history
};

}  // namespace

void check_global(Cluster& cluster, const GlobalAccess& access, uint64_t address, uint64_t bytes) {
    check_written(cluster, access, address, bytes);
    if (cluster.launch->global) {
        Check(cluster, access).run(address, bytes, 0);
    }
}

void check_global_lanes(Warp& w, const Op& op, uint32_t mask, const uint64_t* addresses, uint32_t bytes) {
    if (op.space == Space::kSharedCta || op.space == Space::kSharedCluster) {
        return;
    }
    Cluster& cluster = *w.cta->cluster;
    const GlobalAccess access{w.agent, w.order.clock[w.agent], op.access, false, &w.order};
    const bool stores = op.op_class == OpClass::kStoreGlobal;
    const bool loads = op.op_class == OpClass::kLoadGlobal;
    std::optional<Check> check;
    if (cluster.launch->global) {
        check.emplace(cluster, access, &w, bytes, stores ? &op : nullptr);
    }
    const auto run = [&](uint64_t address, uint64_t all, uint32_t lane) {
        check_written(cluster, access, address, all);
        if (check) {
            check->run(address, all, lane);
        }
    };
    if (mask == kAllLanes && is_one_run(addresses, bytes) && addresses[kLanes - 1] < kSharedWindow) {
        run(addresses[0], uint64_t{bytes} * kLanes, 0);
        return;
    }
    const auto counts = [&](int i) { return i < kLanes && in_mask(mask, i) && addresses[i] < kSharedWindow; };
    for (int i = 0; i < kLanes;) {
        int next = i + 1;
        while (counts(i) && counts(next) && addresses[next] == addresses[next - 1] + bytes) {
            ++next;
        }
        // Lanes that load one address leave the last one's cell.
        const bool again = loads && next == i + 1 && counts(next) && addresses[next] == addresses[i];
        if (counts(i) && !again) {
            run(addresses[i], uint64_t{bytes} * static_cast<uint64_t>(next - i), static_cast<uint32_t>(i));
        }
        i = next;
    }
}

}  // namespace sim
