// Building a cluster of CTAs, running it for a while, and saying why it is stuck.
#pragma once

#include "machine.h"

namespace sim {

enum class RunStatus { kDone, kRunning, kStuck };

std::unique_ptr<Cluster> make_cluster(Launch& launch, uint64_t ordinal);

// Runs about `budget` warp instructions. kStuck: nothing can run until another cluster acts.
RunStatus run_cluster(Cluster& cluster, uint64_t budget);

// Every waiting warp with what it waits for, for the deadlock report.
std::string describe_stuck(Cluster& cluster);

// Why none of the launch's CTAs has begun: how far the one before it is.
std::string describe_not_begun(const Launch& launch);

// Where an error happened: kernel, CTA, warp, instruction.
std::string locate_error(const Cluster& cluster, const std::string& message, int line);

void collect_statistics(Cluster& cluster);

}  // namespace sim
