// Plans of scaled matrix products: where a call has the key of one before, only the addresses of its launch
// change.

#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>

#include "gemm_params.h"
#include "plan_cache/launch_arguments.h"
#include "plan_cache/plan_table.h"

namespace flash8 {

// What a miss made of a call.
struct GemmPlan {
    std::shared_ptr<Kernel> kernel;
    int device = 0;
    GemmParams params{};
    pybind11::object out_like;  // one element, expanded to the shape of out
};

// Everything here runs with the GIL, which guards it too, but for the launch itself.
class GemmCache {
  public:
    explicit GemmCache(TorchTensors::Functions torch);

    // A hit launches, and gives out. None on a miss, which is every call too whose tensors require grad or
    // cannot be launched by the plan that is there.
    pybind11::object run(const CallArguments& call);

    // Whether the call has a key: its tensors are plain ones, and the rest are plain values.
    bool has_key(const CallArguments& call);

    // Keeps the plan of a call that went well, and drops all others if there are most_plans. Not if its
    // launch points to anything but the arguments, to copies of them: there is no plan for such calls.
    void insert(const CallArguments& call, GemmPlan plan, std::size_t most_plans);

    void clear() { plans_.clear(); }
    std::size_t size() const { return plans_.size(); }

  private:
    TorchTensors torch_;
    ArgumentNames names_;
    PlanTable<GemmPlan> plans_;
};

}  // namespace flash8
