// Plans of calls over a KV cache that the decode kernel serves: where a call has the key of one before, only
// the addresses of its launch change.

#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "decode/params.h"
#include "plan_cache/append_plan.h"
#include "plan_cache/launch_arguments.h"
#include "plan_cache/plan_table.h"

namespace flash8 {

// What a miss made of a call.
struct DecodePlan {
    std::shared_ptr<Kernel> kernel;
    int device = 0;
    int sm_margin = 0;
    DecodeParams params{};
    std::size_t partial_bytes = 0;
    bool returns_lse = false;
    std::optional<AppendPlan> append;  // launched before, or within
    // One element each, expanded to the shape of an output.
    pybind11::object out_like;
    pybind11::object lse_like;
};

// Everything here runs with the GIL, which guards it too, but for the launch itself.
class DecodeCache {
  public:
    // workspace: (device, stream, captured, bytes) -> (tickets, partial results): int32 zeros, as many as any
    // launch takes, and at least so many bytes of anything.
    // kernels.registry() has the kernels that serve calls now: it is told apart by identity.
    DecodeCache(TorchTensors::Functions torch, pybind11::object kernels, pybind11::object is_grad_enabled,
                pybind11::object workspace);

    // A call by keywords. A hit launches: (O, LSE or None). None on a miss, which is every call too that
    // autograd has to know of, or whose tensors cannot be launched by the plan that is there.
    pybind11::object run(PyObject* names, PyObject* const* values);

    // Whether the call has a key: its tensors are plain ones, and the rest are plain values.
    bool has_key(const pybind11::dict& call);

    // Keeps the plan of a call that went well, and drops all others if there are most_plans. Not if its
    // launch points to anything but the arguments, to copies of them: there is no plan for such calls.
    void insert(const pybind11::dict& call, DecodePlan plan, std::size_t most_plans);

    void clear() { plans_.clear(); }
    std::size_t size() const { return plans_.size(); }

  private:
    pybind11::object scope() const;

    TorchTensors torch_;
    pybind11::object kernels_;
    pybind11::str registry_;
    pybind11::object is_grad_enabled_;
    ArgumentNames names_;
    StreamMemories workspaces_;
    PlanTable<DecodePlan> plans_;
};

}  // namespace flash8
