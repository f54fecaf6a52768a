#include "memory_sync.h"

#include <algorithm>

#include "checker.h"
#include "launch.h"

namespace sim {
namespace {

constexpr size_t kMostPublications = 8;  // of one address, before they are put together

SyncTable& table_of(Warp& w, uint64_t address) {
    Launch& launch = *w.cta->cluster->launch;
    const bool shared = address >= kSharedWindow && address < kLocalWindow;
    return shared || !launch.global ? w.cta->cluster->sync : *launch.sync;
}

Level distance(const Publication& p, const Warp& w) {
    const Cluster& cluster = *w.cta->cluster;
    if (p.many || p.cluster != cluster.ordinal) {
        return kGpuLevel;
    }
    return p.rank == w.cta->rank ? kCtaLevel : kClusterLevel;
}

// Who knows of the publisher's release has accepted it, or a later one: polling finds the same for long.
bool is_known(const Warp& w, const Publication& p) {
    if (p.time == 0) {
        return false;
    }
    const bool near = p.cluster == w.cta->cluster->ordinal;
    const Clock* clock = near ? &w.order.clock : find_far(w.order.far, p.cluster);
    return clock != nullptr && clock_at(*clock, p.agent) >= p.time;
}

void accept(Warp& w, const Publication& p) {
    Order& order = w.order;
    const uint64_t own = w.cta->cluster->ordinal;
    if (is_known(w, p)) {
        return;
    }
    if (!p.many && p.cluster == own) {
        join(order, p.order);
        return;
    }
    join_far(order.far, p.order.far);
    join_far(order.far_proxy, p.order.far_proxy);
    order.grids |= p.order.grids;
    if (const Clock* clock = find_far(p.order.far, own)) {
        join_clock(order.clock, *clock);
    }
    if (const Clock* clock = find_far(p.order.far_proxy, own)) {
        join_clock(order.global_proxy, *clock);
    }
}

std::shared_ptr<const Publication> publish(Warp& w, uint32_t lanes) {
    auto fresh = std::make_shared<Publication>();
    const Cluster& cluster = *w.cta->cluster;
    fresh->cluster = cluster.ordinal;
    fresh->rank = w.cta->rank;
    fresh->agent = w.agent;
    fresh->time = (w.alive & ~lanes) == 0 ? w.order.clock[w.agent] : 0;
    release(w, lanes, fresh->order);
    Order& order = fresh->order;
    order.far = with_cluster(order.far, cluster.ordinal, order.clock);
    order.far_proxy = with_cluster(order.far_proxy, cluster.ordinal, order.global_proxy);
    return fresh;
}

void add(std::vector<Published>& list, Level level, const std::shared_ptr<const Publication>& what) {
    for (Published& entry : list) {
        if (entry.what == what) {
            entry.level = std::max(entry.level, level);
            return;
        }
    }
    list.push_back({level, what});
}

// Everybody's to everybody: one publication instead of many.
void put_together(std::vector<Published>& list) {
    if (list.size() <= kMostPublications) {
        return;
    }
    auto all = std::make_shared<Publication>();
    all->many = true;
    std::vector<Published> rest;
    for (const Published& entry : list) {
        if (entry.level != kGpuLevel) {
            rest.push_back(entry);
            continue;
        }
        join_far(all->order.far, entry.what->order.far);
        join_far(all->order.far_proxy, entry.what->order.far_proxy);
        all->order.grids |= entry.what->order.grids;
    }
    rest.push_back({kGpuLevel, all});
    list = std::move(rest);
}

}  // namespace

void strong_read(Warp& w, const Op& op, uint64_t address) {
    SyncTable& table = table_of(w, address);
    if (table.empty()) {
        return;
    }
    const auto record = table.find(address);
    if (record == table.end()) {
        return;
    }
    for (const Published& entry : record->second) {
        const Level level = std::min(entry.level, op.level);
        if (level < distance(*entry.what, w)) {
            continue;
        }
        if ((op.memory_order & kAcquires) != 0) {
            accept(w, *entry.what);
        } else {
            add(w.sync.found, level, entry.what);
        }
    }
}

void strong_write(Warp& w, const Op& op, uint64_t address, bool reads_too, uint32_t lanes,
                  std::shared_ptr<const Publication>& own) {
    SyncTable& table = table_of(w, address);
    const bool releases = (op.memory_order & kReleases) != 0;
    const bool publishes = releases || !w.sync.released.empty();
    auto record = table.empty() && !publishes ? table.end() : table.find(address);
    if (record == table.end() && !publishes) {
        return;
    }
    std::vector<Published>& list = record == table.end() ? table[address] : record->second;
    if (!reads_too) {  // what others wrote is gone
        const auto others = [&](const Published& p) {
            return p.what->many || p.what->cluster != w.cta->cluster->ordinal || p.what->agent != w.agent;
        };
        list.erase(std::remove_if(list.begin(), list.end(), others), list.end());
    }
    if (releases) {
        if (!own) {
            own = publish(w, lanes);
        }
        add(list, op.level, own);
    }
    for (const Published& released : w.sync.released) {
        add(list, std::min(released.level, op.level), released.what);
    }
    put_together(list);
}

void fence(Warp& w, Level level, uint32_t lanes) {
    std::vector<Published> rest;
    for (const Published& entry : w.sync.found) {
        if (std::min(level, entry.level) >= distance(*entry.what, w)) {
            accept(w, *entry.what);
        } else {
            rest.push_back(entry);
        }
    }
    w.sync.found = std::move(rest);
    // A wider fence does what a narrower one did.
    auto& released = w.sync.released;
    released.erase(std::remove_if(released.begin(), released.end(),
                                  [&](const Published& p) { return p.level <= level; }),
                   released.end());
    released.push_back({level, publish(w, lanes)});
}

}  // namespace sim
