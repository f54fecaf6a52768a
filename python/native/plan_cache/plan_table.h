// The plans of a plan cache, by the keys of their calls.

#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "plan_cache/call_key.h"

namespace flash8 {

// Everything here needs the GIL, which guards it too.
template <class Plan>
class PlanTable {
  public:
    // Null if there is none. Shared: while torch's functions let other threads run, these may drop it.
    std::shared_ptr<const Plan> find(const CallKey& key) const {
        const auto found = plans_.find(key.bytes());
        return found == plans_.end() ? nullptr
                                     : std::shared_ptr<const Plan>(found->second, &found->second->plan);
    }

    // scope: an object whose identity is in the key, and which is kept alive for that. Drops all others if
    // there are most_plans.
    void insert(const CallKey& key, Plan plan, pybind11::handle scope, std::size_t most_plans) {
        if (plans_.size() >= most_plans) {
            clear();
        }
        auto kept = pybind11::reinterpret_borrow<pybind11::object>(scope);
        plans_[key.bytes()] = std::make_shared<const Entry>(Entry{std::move(plan), std::move(kept)});
    }

    void clear() {
        // What they hold may run Python code as it goes, which must find the table in order.
        const auto dropped = std::exchange(plans_, {});
    }

    std::size_t size() const { return plans_.size(); }

  private:
    struct Entry {
        Plan plan;
        pybind11::object scope;
    };

    std::unordered_map<std::string, std::shared_ptr<const Entry>> plans_;
};

}  // namespace flash8
