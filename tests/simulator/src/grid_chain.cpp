#include "grid_chain.h"

#include <mutex>

#include "launch.h"

namespace sim {
namespace {

struct Latest {
    std::mutex mutex;
    std::unique_ptr<GridChain> chain;
};
Latest& latest() {
    static Latest the_latest;
    return the_latest;
}

std::unique_ptr<GridChain> take_latest() {
    Latest& from = latest();
    const std::lock_guard<std::mutex> lock(from.mutex);
    return std::move(from.chain);
}

void add_to_shadow(Launch& launch) {
    launch.grid_number = launch.global->grids();
    launch.first_access = launch.global->add_grid(*launch.kernel);
}

// The grid itself, and those that it waited for.
uint64_t complete_with(const Launch& launch) {
    return uint64_t{1} << launch.grid_number |
           (launch.waited_for_earlier ? grids_before(launch) : uint64_t{0});
}

}  // namespace

void join_chain(Launch& launch, void* stream, bool dependent) {
    std::unique_ptr<GridChain> chain = take_latest();
    if (!launch.config.check_races || launch.config.threads > 1) {
        return;
    }
    if (chain && dependent && chain->stream == stream && chain->global->has_room(*launch.kernel)) {
        launch.global = std::move(chain->global);
        launch.sync = std::move(chain->sync);
        launch.first_cluster = chain->clusters;
        launch.earlier_grids = chain->finished;
    } else {
        launch.global = std::make_shared<GlobalShadow>();
        launch.sync = std::make_shared<SyncTable>();
    }
    add_to_shadow(launch);
}

bool can_follow(const Launch& launch, const Launch& prerequisite) {
    return !prerequisite.global || prerequisite.global->has_room(*launch.kernel);
}

void follow(Launch& launch, const Launch& prerequisite) {
    launch.prerequisite = &prerequisite;
    if (prerequisite.global) {
        launch.global = prerequisite.global;
        launch.sync = prerequisite.sync;
        launch.first_cluster = prerequisite.first_cluster + prerequisite.cluster_count();
        add_to_shadow(launch);
    }
}

uint64_t grids_before(const Launch& launch) {
    if (!launch.global) {
        return 0;
    }
    return launch.prerequisite == nullptr ? launch.earlier_grids : complete_with(*launch.prerequisite);
}

void leave_chain(Launch& launch, void* stream) {
    if (!launch.global || launch.failed) {
        return;
    }
    auto chain = std::make_unique<GridChain>();
    chain->stream = stream;
    chain->clusters = launch.first_cluster + launch.cluster_count();
    chain->finished = complete_with(launch);
    chain->global = std::move(launch.global);
    chain->sync = std::move(launch.sync);
    Latest& to = latest();
    const std::lock_guard<std::mutex> lock(to.mutex);
    to.chain = std::move(chain);
}

void end_chain() {
    take_latest();
}

}  // namespace sim
