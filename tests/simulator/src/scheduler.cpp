#include "scheduler.h"

#include <algorithm>

#include "async_copy.h"
#include "cluster_run.h"
#include "errors.h"
#include "interpreter.h"
#include "launch.h"
#include "mbarrier.h"
#include "warp_sync.h"
#include "wgmma.h"

namespace sim {

bool registers_available(const Warp& warp, uint32_t wanted);

namespace {

constexpr uint32_t kStallRounds = 4;
constexpr uint64_t kSpin = 1000;  // warp instructions without progress that look like polling

struct Choice {
    Warp* warp = nullptr;
    int fragment = 0;
};

class ClusterRunner {
  public:
    explicit ClusterRunner(Cluster& cluster)
        : cluster_(cluster), launch_(*cluster.launch), warps_(cluster.warps) {}

    RunStatus run(uint64_t budget) {
        uint64_t executed = 0;
        while (executed < budget) {
            if (launch_.failed.load(std::memory_order_relaxed)) {
                return RunStatus::kDone;
            }
            if (launch_.adversarial) {
                stir();
            }
            const Choice choice = choose();
            if (choice.warp != nullptr) {
                executed += run_choice(choice);
                if (cluster_.gives_way) {
                    cluster_.gives_way = false;
                    return RunStatus::kRunning;
                }
                if (launch_.adversarial && cluster_.executed - cluster_.executed_at_progress > kSpin) {
                    return RunStatus::kRunning;  // somebody else may have what it waits for
                }
                continue;
            }
            if (all_exited()) {
                if (cluster_.async.empty()) {
                    return RunStatus::kDone;
                }
                // Stores of a CTA that has exited land while others run.
                if (launch_.adversarial && cluster_.random() % 4 != 0) {
                    return RunStatus::kRunning;
                }
                if (!perform_one_async()) {
                    return RunStatus::kRunning;
                }
                continue;
            }
            if (perform_one_async() || run_one_wgmma(cluster_)) {
                continue;
            }
            if (!cluster_.async.empty()) {  // stores that hold back
                if (!waits_for_stores()) {
                    return RunStatus::kRunning;
                }
                perform_one_async(true);
                continue;
            }
            if (!time_out_waits()) {
                return RunStatus::kStuck;
            }
        }
        return RunStatus::kRunning;
    }

  private:
    bool all_exited() const {
        return std::all_of(warps_.begin(), warps_.end(), [](const Warp* w) { return w->alive == 0; });
    }

    int ready_fragment(Warp& w) const {
        const int count = static_cast<int>(w.fragments.size());
        for (int i = 0; i < count; ++i) {
            const int at = (w.current + i) % count;
            if (fragment_ready(w, w.fragments[static_cast<size_t>(at)])) {
                return at;
            }
        }
        return -1;
    }

    Choice choose() {
        if (launch_.adversarial) {
            return choose_adversarial();
        }
        return launch_.config.timeline ? choose_by_time() : choose_plain();
    }

    // The warp whose logical clock is behind all others', so that a timeline's events follow each other.
    Choice choose_by_time() {
        Choice best;
        for (Warp* w : warps_) {
            const bool earlier = w->alive != 0 && (best.warp == nullptr || w->time < best.warp->time);
            const int fragment = earlier ? ready_fragment(*w) : -1;
            if (fragment >= 0) {
                best = {w, fragment};
            }
        }
        return best;
    }

    Choice choose_plain() {
        const size_t count = warps_.size();
        for (size_t i = 0; i < count; ++i) {
            Warp* w = warps_[(cluster_.next_warp + i) % count];
            const int fragment = w->alive != 0 ? ready_fragment(*w) : -1;
            if (fragment >= 0) {
                cluster_.next_warp = static_cast<uint32_t>((cluster_.next_warp + i + 1) % count);
                return {w, fragment};
            }
        }
        return {};
    }

    // Odd seeds run the warp of the highest priority and now and then change one; even seeds pick at
    // random. The first starves warps for long, the second interleaves finely.
    Choice choose_adversarial() {
        Choice best;
        uint32_t best_priority = 0;
        uint32_t seen = 0;
        const bool by_priority = (launch_.config.seed & 1) != 0;
        for (size_t i = 0; i < warps_.size(); ++i) {
            Warp* w = warps_[i];
            const int fragment = w->alive != 0 ? ready_fragment(*w) : -1;
            if (fragment < 0) {
                continue;
            }
            ++seen;
            const bool better = by_priority ? best.warp == nullptr || cluster_.priorities[i] > best_priority
                                            : cluster_.random() % seen == 0;
            if (better) {
                best = {w, fragment};
                best_priority = cluster_.priorities[i];
            }
        }
        return best;
    }

    void stir() {
        if (cluster_.priorities.empty()) {
            for (size_t i = 0; i < warps_.size(); ++i) {
                cluster_.priorities.push_back(static_cast<uint32_t>(cluster_.random() >> 33));
            }
        }
        if (cluster_.random() % 64 == 0) {
            cluster_.priorities[cluster_.random() % warps_.size()] =
                static_cast<uint32_t>(cluster_.random() >> 33);
        }
        if (launch_.config.async == AsyncPolicy::kRandom && cluster_.random() % 4 == 0) {
            perform_one_async();
            run_one_wgmma(cluster_);
        }
    }

    uint32_t run_choice(const Choice& choice) {
        Warp& w = *choice.warp;
        cluster_.running = &w;
        w.current = choice.fragment;
        uint32_t quantum = launch_.quantum;
        if (launch_.adversarial) {
            quantum = 1 + static_cast<uint32_t>(cluster_.random() % quantum);
        }
        begin_run(w);
        const uint32_t executed = run_warp(w, quantum, launch_.config.any_register_check());
        end_run(w);
        // A fragment that blocked or spins lets the warp's others go first.
        if (w.fragments.size() > 1) {
            w.current = static_cast<int>((static_cast<size_t>(w.current) + 1) % w.fragments.size());
        }
        cluster_.executed += executed;
        note_progress();
        cluster_.running = nullptr;
        return std::max(executed, 1u);
    }

    void note_progress() {
        if (cluster_.progress != cluster_.seen_progress) {
            cluster_.seen_progress = cluster_.progress;
            cluster_.executed_at_progress = cluster_.executed;
            cluster_.stall_rounds = 0;
        }
    }

    // Whether a warp's wait_group is for more than the reads.
    bool waits_for_stores() const {
        const auto waits = [](const Fragment& f) {
            return f.wait.kind == WaitKind::kBulkGroup && f.wait.parity == 0;
        };
        return std::any_of(warps_.begin(), warps_.end(), [&](const Warp* w) {
            return std::any_of(w->fragments.begin(), w->fragments.end(), waits);
        });
    }

    // The first of the items from here on that does not hold back; their number if there is none.
    size_t next_item(size_t first, bool held_too) const {
        const auto& items = cluster_.async;
        for (size_t i = 0; i < items.size(); ++i) {
            const size_t at = (first + i) % items.size();
            if (held_too || items[at]->due <= cluster_.turn) {
                return at;
            }
        }
        return items.size();
    }

    bool perform_one_async(bool held_too = false) {
        auto& items = cluster_.async;
        if (items.empty()) {
            return false;
        }
        const size_t at = next_item(launch_.adversarial ? cluster_.random() % items.size() : 0, held_too);
        if (at == items.size()) {
            return false;
        }
        // A step of a copy may wait for older copies of its warp: then take those first.
        AsyncItem& item = *items[at];
        cluster_.running = item.cta != nullptr ? &item.cta->warps[item.warp_index] : nullptr;
        if (item.perform(cluster_)) {
            record_engine(cluster_, item);
            items.erase(items.begin() + static_cast<std::ptrdiff_t>(at));
        }
        cluster_.running = nullptr;
        ++cluster_.progress;
        return true;
    }

    // try_wait may give up after a while: let every one do so, unless that led nowhere before.
    bool time_out_waits() {
        if (cluster_.stall_rounds >= kStallRounds) {
            return false;
        }
        ++cluster_.stall_rounds;
        bool any = false;
        for (Warp* w : warps_) {
            for (Fragment& fragment : w->fragments) {
                if (fragment.wait.kind == WaitKind::kMbarrier) {
                    fragment.wait.timed_out = true;
                    any = true;
                }
            }
        }
        return any;
    }

    Cluster& cluster_;
    Launch& launch_;
    const std::vector<Warp*>& warps_;
};

Cta& cta_of(Warp& w, uint32_t address) {
    return *w.cta->cluster->ctas[address >> kRankShift];
}

}  // namespace

bool fragment_ready(Warp& w, const Fragment& fragment) {
    const Wait& wait = fragment.wait;
    switch (wait.kind) {
        case WaitKind::kNone:
            return true;
        case WaitKind::kMbarrier:
            return wait.timed_out || mbarrier_ready(cta_of(w, wait.address), wait);
        case WaitKind::kNamedBarrier:
            return w.cta->barriers[wait.address].generation != wait.phase;
        case WaitKind::kClusterBarrier:
            return w.cta->cluster->barrier_generation > wait.phase;
        case WaitKind::kWgmma:
            return wgmma_issued_by_all(w, static_cast<uint32_t>(wait.phase));
        case WaitKind::kBulkGroup:
            return bulk_groups_done(w, fragment.mask, wait.address, wait.parity != 0);
        case WaitKind::kCpAsync:
            return cp_async_done(w, fragment.mask, wait.address);
        case WaitKind::kWarpSync:
            return can_meet(w, fragment);
        case WaitKind::kRegisters:
            return registers_available(w, wait.address);
        case WaitKind::kEarlierGrids:
            return w.cta->cluster->launch->earlier_complete();
    }
    return true;
}

bool completes_at_issue(const Cluster& cluster) {
    return cluster.launch->config.async == AsyncPolicy::kEarly;
}

void submit(Cluster& cluster, std::unique_ptr<AsyncItem> item) {
    if (!completes_at_issue(cluster)) {
        cluster.async.push_back(std::move(item));
        return;
    }
    while (!item->perform(cluster)) {
    }
    record_engine(cluster, *item);
}

RunStatus run_cluster(Cluster& cluster, uint64_t budget) {
    return ClusterRunner(cluster).run(budget);
}

}  // namespace sim
