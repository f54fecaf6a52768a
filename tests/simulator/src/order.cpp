#include "order.h"

#include <algorithm>

namespace sim {
namespace {

bool covers(const Clock& clock, const Clock& other) {
    for (size_t i = 0; i < other.size(); ++i) {
        if (other[i] > clock_at(clock, static_cast<uint32_t>(i))) {
            return false;
        }
    }
    return true;
}

bool covers(const FarClock& table, const FarClock& other) {
    size_t at = 0;
    for (const auto& [cluster, clock] : other) {
        while (at < table.size() && table[at].first < cluster) {
            ++at;
        }
        if (at == table.size() || table[at].first != cluster || !covers(table[at].second, clock)) {
            return false;
        }
    }
    return true;
}

Far merged(const FarClock& a, const FarClock& b) {
    auto result = std::make_shared<FarClock>();
    result->reserve(a.size() + b.size());
    size_t i = 0, j = 0;
    while (i < a.size() || j < b.size()) {
        if (j == b.size() || (i < a.size() && a[i].first < b[j].first)) {
            result->push_back(a[i++]);
        } else if (i == a.size() || b[j].first < a[i].first) {
            result->push_back(b[j++]);
        } else {
            result->push_back(a[i++]);
            join_clock(result->back().second, b[j++].second);
        }
    }
    return result;
}

}  // namespace

void set_clock(Clock& clock, uint32_t agent, uint32_t time) {
    if (clock.size() <= agent) {
        clock.resize(agent + 1, 0);
    }
    clock[agent] = std::max(clock[agent], time);
}

void join_clock(Clock& into, const Clock& from) {
    if (into.size() < from.size()) {
        into.resize(from.size(), 0);
    }
    for (size_t i = 0; i < from.size(); ++i) {
        into[i] = std::max(into[i], from[i]);
    }
}

void join_far(Far& into, const Far& from) {
    if (!from || into == from) {
        return;
    }
    if (!into || covers(*from, *into)) {
        into = from;
    } else if (!covers(*into, *from)) {
        into = merged(*into, *from);
    }
}

void join(Order& into, const Order& from) {
    join_clock(into.clock, from.clock);
    join_clock(into.shared_proxy, from.shared_proxy);
    join_clock(into.global_proxy, from.global_proxy);
    join_far(into.far, from.far);
    join_far(into.far_proxy, from.far_proxy);
    into.grids |= from.grids;
}

const Clock* find_far(const Far& far, uint64_t cluster) {
    if (!far) {
        return nullptr;
    }
    const auto found = std::lower_bound(
        far->begin(), far->end(), cluster,
        [](const std::pair<uint64_t, Clock>& entry, uint64_t key) { return entry.first < key; });
    return found != far->end() && found->first == cluster ? &found->second : nullptr;
}

Far with_cluster(const Far& far, uint64_t cluster, const Clock& clock) {
    const FarClock own{{cluster, clock}};
    return far ? merged(*far, own) : std::make_shared<FarClock>(own);
}

}  // namespace sim
