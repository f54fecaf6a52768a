// Launches over the host's threads: each takes clusters, keeps several resident while they wait for
// one another, and stops everything at the first finding.
#include "launch.h"

#include <algorithm>
#include <random>
#include <thread>

#include "cluster_run.h"
#include "errors.h"

namespace sim {
namespace {

void fail(Launch& launch, ErrorKind kind, const std::string& message) {
    const std::lock_guard<std::mutex> lock(launch.mutex);
    if (!launch.failed.exchange(true)) {
        launch.error = message;
        launch.error_kind = kind;
    }
}

constexpr uint64_t kDevice = uint64_t{1} << 40;  // what the resident clusters of a host thread share

// One host thread's part of the work. In plain order a cluster runs until it waits; under a seed all
// that the device holds are resident, and which of them goes on, and for how long, is drawn.
class Worker {
  public:
    Worker(const std::vector<Launch*>& launches, uint64_t index)
        : launches_(launches),
          launch_(*launches.front()),
          random_(launch_.config.seed * 0x9E3779B97F4A7C15ull + index) {}

    void run() {
        while (!failed()) {
            while ((launch_.adversarial || live_.empty()) && admit()) {
            }
            if (live_.empty()) {
                return;
            }
            if (launch_.adversarial) {
                turn();
            } else {
                round();
            }
        }
    }

  private:
    bool failed() const {
        return std::any_of(launches_.begin(), launches_.end(),
                           [](const Launch* launch) { return launch->failed.load(); });
    }

    // The launch whose CTAs are to become resident next; null when they are all, or may not yet.
    Launch* next_launch() const {
        for (Launch* launch : launches_) {
            if (launch->next_cluster < launch->cluster_count()) {
                return launch->may_begin() ? launch : nullptr;
            }
        }
        return nullptr;
    }

    // CTAs become resident in the order of their numbers, as on the device.
    bool admit() {
        Launch* launch = next_launch();
        if (launch == nullptr || taken_ + launch->cluster_share > kDevice) {
            return false;
        }
        const uint64_t ordinal = launch->next_cluster.fetch_add(1);
        if (ordinal >= launch->cluster_count()) {
            return false;
        }
        taken_ += launch->cluster_share;
        live_.push_back(make_cluster(*launch, ordinal));
        live_.back()->priority = static_cast<uint32_t>(random_());
        return true;
    }

    bool polls_too_long(const Cluster& cluster) const {
        return cluster.executed - cluster.executed_at_progress > launch_.config.stall_limit;
    }

    void retire(size_t at) {
        collect_statistics(*live_[at]);
        Launch& launch = *live_[at]->launch;
        taken_ -= launch.cluster_share;
        ++launch.ended_clusters;
        live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(at));
    }

    // One turn of every resident cluster.
    void round() {
        bool progress = false;
        for (size_t i = 0; i < live_.size() && !failed();) {
            Cluster& cluster = *live_[i];
            const uint64_t before = cluster.progress;
            cluster.stall_rounds = 0;
            const RunStatus status = step(cluster, launch_.slice);
            progress = progress || status == RunStatus::kDone || cluster.progress != before ||
                       (status == RunStatus::kRunning && !polls_too_long(cluster));
            if (status == RunStatus::kDone) {
                retire(i);
            } else {
                ++i;
            }
        }
        // Those that wait may wait for a CTA that has not started.
        const bool admitted = !live_.empty() && admit();
        if (!progress && !admitted && !live_.empty() && !failed()) {
            report_deadlock();
        }
    }

    // A slice of one resident cluster. One that could not go on is asked again after somebody else acted.
    void turn() {
        const size_t at = choose();
        if (at == live_.size()) {
            report_deadlock();
            return;
        }
        Cluster& cluster = *live_[at];
        if (cluster.asked_at != acts_) {
            cluster.asked_at = acts_;
            cluster.stall_rounds = 0;
        }
        cluster.turn = ++turns_;
        const uint64_t before = cluster.progress;
        const RunStatus status = step(cluster, 1 + random_() % launch_.slice);
        if (status == RunStatus::kDone) {
            retire(at);
            ++acts_;
        } else if (cluster.progress != before) {
            ++acts_;
        } else {
            cluster.priority /= 2;  // it polls: somebody else must act
            cluster.quiet_since =
                status == RunStatus::kStuck || polls_too_long(cluster) ? acts_ : cluster.quiet_since;
        }
    }

    // Some seeds pick at random. Others run the cluster of the highest priority and now and then change its
    // priority, which lets one CTA fall far behind the rest.
    size_t choose() {
        const bool by_priority = launch_.config.seed % 4 < 2;
        const size_t first = random_() % live_.size();
        size_t best = live_.size();
        for (size_t i = 0; i < live_.size(); ++i) {
            const size_t at = (first + i) % live_.size();
            if (live_[at]->quiet_since == acts_) {
                continue;
            }
            if (best == live_.size() || live_[at]->priority > live_[best]->priority) {
                best = at;
            }
            if (!by_priority) {
                break;
            }
        }
        if (random_() % 8 == 0) {
            live_[random_() % live_.size()]->priority = static_cast<uint32_t>(random_());
        }
        return best;
    }

    RunStatus step(Cluster& cluster, uint64_t budget) {
        try {
            return run_cluster(cluster, budget);
        } catch (const SimError& error) {
            fail(*cluster.launch, error.kind(),
                 std::string("[") + name_of(error.kind()) + "] " +
                     locate_error(cluster, error.what(), error.line()));
            return RunStatus::kDone;
        }
    }

    void report_deadlock() {
        const Launch* launch = live_.front()->launch;
        std::string text = "[deadlock] kernel " + launch->kernel->name + ": no warp can go on:";
        size_t shown = 0;
        for (auto& cluster : live_) {
            if (cluster->launch != launch) {
                launch = cluster->launch;
                text += "\n kernel " + launch->kernel->name + ":";
                shown = 0;
            }
            if (++shown <= 4) {
                text += describe_stuck(*cluster);
            } else if (shown == 5) {
                text += format("\n  ... and %zu more clusters", clusters_of(*launch) - 4);
            }
        }
        for (const Launch* each : launches_) {
            text += each->next_cluster == 0 ? describe_not_begun(*each) : std::string();
        }
        fail(*live_.front()->launch, ErrorKind::kDeadlock, text);
    }

    size_t clusters_of(const Launch& launch) const {
        return static_cast<size_t>(std::count_if(live_.begin(), live_.end(),
                                                 [&](const auto& each) { return each->launch == &launch; }));
    }

    const std::vector<Launch*>& launches_;
    Launch& launch_;  // the first: seed and schedule are the same for all
    uint64_t taken_ = 0;
    std::mt19937 random_;
    uint64_t acts_ = 1;  // times a resident cluster got on
    uint64_t turns_ = 0;
    std::vector<std::unique_ptr<Cluster>> live_;
};

// Asynchronous work is early for a third of the seeds, late for a third, anything for the rest.
void choose_schedule(Launch& launch) {
    Config& config = launch.config;
    launch.adversarial = config.seed != 0;
    launch.quantum = config.quantum != 0 ? config.quantum : config.timeline ? 16 : 4096;
    if (!launch.adversarial) {
        return;
    }
    static const uint32_t quanta[] = {8, 64, 3, 512};
    if (config.quantum == 0) {
        launch.quantum = quanta[(config.seed / 2) % 4];
    }
    launch.late_dependents = config.seed % 5 == 4;
    static const uint64_t slices[] = {4000, 64, 100'000, 500};
    launch.slice = slices[(config.seed / 3) % 4];
    if (!config.async_set) {
        static const AsyncPolicy policies[] = {AsyncPolicy::kEarly, AsyncPolicy::kLate, AsyncPolicy::kRandom};
        config.async = policies[config.seed % 3];
    }
}

// How many clusters of the launch alone the device holds.
uint64_t residents_of(const Launch& launch) {
    const uint64_t per_multiprocessor =
        std::max<uint64_t>(1, 2048 / std::max<uint64_t>(1, launch.block.count()));
    const uint64_t shared = launch.kernel->static_shared_bytes + launch.dynamic_shared + 1024;
    const uint64_t by_shared = std::max<uint64_t>(1, 228 * 1024 / shared);
    return launch.config.multiprocessors * std::min(per_multiprocessor, by_shared) / launch.cluster.count();
}

}  // namespace

bool run_launches(const std::vector<Launch*>& launches) {
    uint64_t clusters = 0;
    for (Launch* launch : launches) {
        choose_schedule(*launch);
        clusters += launch->cluster_count();
    }
    const uint64_t threads =
        std::max<uint64_t>(1, std::min<uint64_t>(launches.front()->config.threads, clusters));
    for (Launch* launch : launches) {
        launch->cluster_share = kDevice / std::max<uint64_t>(1, residents_of(*launch) / threads);
    }
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < threads; ++i) {
        others.emplace_back([&, i] { Worker(launches, i).run(); });
    }
    Worker(launches, 0).run();
    for (std::thread& thread : others) {
        thread.join();
    }
    return std::none_of(launches.begin(), launches.end(),
                        [](const Launch* launch) { return launch->failed.load(); });
}

}  // namespace sim
