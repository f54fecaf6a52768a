// Plans of forward calls: where a call has the key of one before, only the addresses of its launch change.

#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "driver/library.h"
#include "forward/params.h"
#include "plan_cache/launch_arguments.h"
#include "plan_cache/plan_table.h"
#include "plan_cache/torch_tensors.h"

namespace flash8 {

// What a miss made of a call.
struct CallPlan {
    std::shared_ptr<Kernel> kernel;
    int device = 0;
    int sm_margin = 0;
    bool dynamic_schedule = false;
    ForwardParams params{};
    // One element each, expanded to the shape of an output: empty_like of it is the quickest way to one.
    pybind11::object out_like;
    pybind11::object lse_like;
    pybind11::object options;  // come back where autograd has to know of the call
    bool by_address = true;    // new addresses are all that another launch needs
};

// The plans of calls. Everything here runs with the GIL, which guards it too, but for the launch itself.
class PlanCache {
  public:
    // tile_count: (device, stream, captured) -> int32 tensor of two elements.
    PlanCache(TorchTensors::Functions torch, pybind11::object tile_count);

    // A hit launches: (O, LSE or None, options or None). None on a miss, which is every call too whose
    // tensors cannot be launched by the plan that is there. LSE is made if it is wanted; it and the options
    // come where autograd, when it is enabled, has to know of the call.
    pybind11::object run(const CallArguments& call, bool want_lse, bool grad_enabled);

    // Whether the call has a key: its tensors are plain ones, and the rest are plain values.
    bool has_key(const CallArguments& call);

    // Keeps the plan of a call that went well, unless there is one, and drops all others if there are
    // most_plans. If its launch points to anything but the arguments, to copies of them, calls with this key
    // will be misses.
    void insert(const CallArguments& call, CallPlan plan, std::size_t most_plans);

    void clear() { plans_.clear(); }
    std::size_t size() const { return plans_.size(); }

  private:
    TorchTensors torch_;
    ArgumentNames names_;
    PlanTable<CallPlan> plans_;
    StreamMemories counters_;
};

}  // namespace flash8
