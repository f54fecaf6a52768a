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
    }
    launch.first_access = launch.global->add_grid(*launch.kernel);
}

void leave_chain(Launch& launch, void* stream) {
    if (!launch.global || launch.failed) {
        return;
    }
    auto chain = std::make_unique<GridChain>();
    chain->stream = stream;
    chain->clusters = launch.first_cluster + launch.cluster_count();
    chain->finished =
        launch.global->grid_bit() | (launch.waited_for_earlier ? launch.earlier_grids : uint64_t{0});
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
