// Who runs next. In plain order, or by a seed in the most inconvenient one the program allows.
#pragma once

#include "machine.h"

namespace sim {

// A warp's last lane has exited.
void on_warp_exit(Warp& warp);

// The CTA does not keep the next grid from beginning, or no longer does.
void allow_dependents(Cta& cta);

// Hands work to an engine: done at once, later, or when nothing else can run, by the policy.
void submit(Cluster& cluster, std::unique_ptr<AsyncItem> item);

// True with the policy that finishes asynchronous work where it is issued.
bool completes_at_issue(const Cluster& cluster);

bool fragment_ready(Warp& warp, const Fragment& fragment);

}  // namespace sim
