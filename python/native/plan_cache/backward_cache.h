// Plans of backward calls: where a call has the key of one before, only the addresses of its launches change.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "backward/params.h"
#include "kernels/launch_backward.h"
#include "plan_cache/launch_arguments.h"
#include "plan_cache/plan_table.h"
#include "plan_cache/torch_tensors.h"

namespace flash8 {

// A backward as autograd asks for it.
struct BackwardCall {
    pybind11::handle scope;    // whose kernels serve it; told apart by identity
    pybind11::tuple saved;     // q, k, v, qv, s_aux, O, LSE, then the options called `names`
    pybind11::tuple incoming;  // dO, dLSE
    pybind11::tuple options;   // flash8.call.options.Options; what is in `saved` is None
    pybind11::tuple names;
    bool deterministic;  // torch asks for it
};

// What a miss made of a call.
struct BackwardPlan {
    std::array<std::shared_ptr<Kernel>, 3> kernels;  // in the order of their launches
    int device = 0;
    BackwardParams params{};
    // One element each, expanded to the shape of an output; dsinks is None without sinks.
    pybind11::object dq_like;
    pybind11::object dk_like;
    pybind11::object dv_like;
    pybind11::object dsinks_like;
    pybind11::object workspace_like;  // with kWorkspaceUnit bytes more than its parts take
};

// Everything here runs with the GIL, which guards it too, but for the launches themselves.
class BackwardCache {
  public:
    // field_names: of Options, in order.
    BackwardCache(TorchTensors::Functions torch, const pybind11::tuple& field_names);

    // A hit launches: (dQ, dK, dV, gradient of the sinks or None). None on a miss.
    pybind11::object run(const BackwardCall& call) const;

    // Keeps the plan of a call that went well, and drops all others if there are most_plans. Not if its
    // launches point to anything but the arguments, to copies of them: there is no plan for such calls.
    void insert(const BackwardCall& call, BackwardPlan plan, std::size_t most_plans);

    void clear() { plans_.clear(); }
    std::size_t size() const { return plans_.size(); }

  private:
    bool read(CallKey& key, const BackwardCall& call) const;
    std::optional<std::size_t> field_of(PyObject* name) const;

    TorchTensors torch_;
    std::vector<pybind11::object> field_names_;
    std::vector<const TensorArgument*> fields_;  // null: launches read no such tensor
    PlanTable<BackwardPlan> plans_;
};

}  // namespace flash8
