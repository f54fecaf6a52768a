// A launch over the host's threads: each takes clusters, keeps several resident while they wait for
// one another, and stops everything at the first finding.
#include "launch.h"

#include <thread>

#include "cluster_run.h"
#include "errors.h"

namespace sim {
namespace {

constexpr uint64_t kSlice = 250'000;  // warp instructions before another resident cluster has its turn

void fail(Launch& launch, ErrorKind kind, const std::string& message) {
    const std::lock_guard<std::mutex> lock(launch.mutex);
    if (!launch.failed.exchange(true)) {
        launch.error = message;
        launch.error_kind = kind;
    }
}

class Worker {
  public:
    Worker(Launch& launch, uint64_t residents) : launch_(launch), residents_(residents) {}

    void run() {
        while (!launch_.failed) {
            if (live_.empty() && !admit()) {
                return;
            }
            round();
        }
    }

  private:
    bool admit() {
        const uint64_t ordinal = launch_.next_cluster.fetch_add(1);
        if (ordinal >= launch_.cluster_count()) {
            return false;
        }
        live_.push_back(make_cluster(launch_, ordinal));
        return true;
    }

    // One turn of every resident cluster.
    void round() {
        bool progress = false;
        for (size_t i = 0; i < live_.size() && !launch_.failed;) {
            Cluster& cluster = *live_[i];
            const uint64_t before = cluster.progress;
            const RunStatus status = step(cluster);
            const bool polls_too_long =
                cluster.executed - cluster.executed_at_progress > launch_.config.stall_limit;
            progress = progress || status == RunStatus::kDone || cluster.progress != before ||
                       (status == RunStatus::kRunning && !polls_too_long);
            if (status == RunStatus::kDone) {
                collect_statistics(cluster);
                live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(i));
                continue;
            }
            cluster.stall_rounds = 0;
            ++i;
        }
        // Those that wait may wait for a CTA that has not started.
        const bool admitted = !live_.empty() && live_.size() < residents_ && admit();
        if (!progress && !admitted && !live_.empty() && !launch_.failed) {
            report_deadlock();
        }
    }

    RunStatus step(Cluster& cluster) {
        try {
            return run_cluster(cluster, kSlice);
        } catch (const SimError& error) {
            fail(launch_, error.kind(),
                 std::string("[") + name_of(error.kind()) + "] " +
                     locate_error(cluster, error.what(), error.line()));
            return RunStatus::kDone;
        }
    }

    void report_deadlock() {
        std::string text = "[deadlock] kernel " + launch_.kernel->name + ": no warp can go on:";
        size_t shown = 0;
        for (auto& cluster : live_) {
            if (++shown > 4) {
                text += format("\n  ... and %zu more clusters", live_.size() - 4);
                break;
            }
            text += describe_stuck(*cluster);
        }
        fail(launch_, ErrorKind::kDeadlock, text);
    }

    Launch& launch_;
    uint64_t residents_;
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
    if (!config.async_set) {
        static const AsyncPolicy policies[] = {AsyncPolicy::kEarly, AsyncPolicy::kLate, AsyncPolicy::kRandom};
        config.async = policies[config.seed % 3];
    }
}

}  // namespace

bool run_launch(Launch& launch) {
    choose_schedule(launch);
    const uint64_t clusters = launch.cluster_count();
    const uint64_t threads = std::max<uint64_t>(1, std::min<uint64_t>(launch.config.threads, clusters));
    const uint64_t per_multiprocessor =
        std::max<uint64_t>(1, 2048 / std::max<uint64_t>(1, launch.block.count()));
    const uint64_t shared = launch.kernel->static_shared_bytes + launch.dynamic_shared + 1024;
    const uint64_t by_shared = std::max<uint64_t>(1, 228 * 1024 / shared);
    const uint64_t resident_ctas = launch.config.multiprocessors * std::min(per_multiprocessor, by_shared);
    const uint64_t residents = std::max<uint64_t>(1, resident_ctas / launch.cluster.count() / threads);
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < threads; ++i) {
        others.emplace_back([&] { Worker(launch, residents).run(); });
    }
    Worker(launch, residents).run();
    for (std::thread& thread : others) {
        thread.join();
    }
    return !launch.failed;
}

}  // namespace sim
