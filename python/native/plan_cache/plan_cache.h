// Forward calls that are like one before: their launch is known, and only addresses change.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "driver/library.h"
#include "forward/params.h"
#include "plan_cache/call_key.h"
#include "plan_cache/tensor_reader.h"

namespace flash8 {

// The arguments of an attention call as the caller gave them.
struct CallArguments {
    pybind11::handle scope;   // whose kernels serve it; told apart by identity
    pybind11::tuple inputs;   // (q, k, v, qv, s_aux, out)
    pybind11::tuple options;  // flash8.call.options.Options
    pybind11::object window;
};

// What the whole way made of a call.
struct CallPlan {
    std::shared_ptr<Kernel> kernel;
    int device = 0;
    int sm_margin = 0;
    bool dynamic_schedule = false;
    ForwardParams params{};
    // One element each, expanded to the shape of an output: empty_like of it is the quickest way to one.
    pybind11::object out_like;
    pybind11::object lse_like;
    pybind11::object note;  // comes back with the outputs of a call that autograd has to know of
};

// The plans of calls. Everything here runs with the GIL, which guards it too, but for the launch itself.
class PlanCache {
  public:
    // What torch and the Hopper backend do for it, as Python objects.
    struct Torch {
        pybind11::object exchange_api;  // torch.Tensor.__dlpack_c_exchange_api__, or None
        std::array<pybind11::object, 2> tensor_types;
        pybind11::object empty_like;
        pybind11::object current_stream;  // (tensor) -> handle
        pybind11::object tile_count;      // (device, stream, captured) -> int32 tensor of two elements
    };

    // option_names: the fields of Options, in order.
    PlanCache(Torch torch, const std::vector<std::string>& option_names);

    // (O, LSE or None, note or None) of a call that is like one before; None if there is none, or if
    // something about its tensors keeps it from going the same way. LSE is made if it is wanted; it and the
    // note come where autograd, when it is enabled, has to know of the call.
    pybind11::object run(const CallArguments& arguments, bool want_lse, bool grad_enabled);

    // Whether a call like this one has been cached.
    bool contains(const CallArguments& arguments) const;

    // Keeps the plan of a call that went well, and forgets all others if there are most_plans. If its launch
    // points to anything but the arguments, to copies of them, `run` will let calls like it go the whole way.
    void insert(const CallArguments& arguments, CallPlan plan, std::size_t most_plans);

    void clear();
    std::size_t size() const { return plans_.size(); }

  private:
    struct CachedPlan {
        CallPlan plan;
        bool repeatable;         // by new addresses alone
        pybind11::object scope;  // kept alive: its identity is in the key
    };

    using CounterKey = std::tuple<int, int, std::uint64_t, unsigned long>;  // device, stream, thread

    std::size_t place_of(const CallKey::Tensor& tensor) const;
    CallKey new_key() const;
    bool read(CallKey& call, const CallArguments& arguments) const;
    std::shared_ptr<const CachedPlan> find(const CallKey& call) const;
    bool needs_graph(const CallKey& call, bool grad_enabled, bool& needed) const;
    bool can_write_out(const CallKey& call) const;
    pybind11::object put_arguments(const CallKey& call, bool graph, ForwardParams& params) const;
    pybind11::object make_out(const CallKey& call, const CallPlan& plan) const;
    pybind11::object counter(const CallKey& call, const CallPlan& plan, std::uint64_t stream);
    std::uint64_t current_stream(const CallKey& call) const;
    std::uintptr_t address_of(const pybind11::object& tensor) const;

    Torch torch_;
    TensorReader reader_;
    std::vector<std::size_t>
        places_;  // of inputs and options: where in the parameters an address goes, or kNowhere
    std::unordered_map<std::string, std::shared_ptr<const CachedPlan>> plans_;
    std::map<CounterKey, pybind11::object> counters_;
};

}  // namespace flash8
