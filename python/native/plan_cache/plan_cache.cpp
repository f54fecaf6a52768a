#include "plan_cache/plan_cache.h"

#include <cstddef>
#include <iterator>
#include <utility>

#include "driver/gil.h"
#include "kernels/launch_forward.h"

namespace py = pybind11;

namespace flash8 {

namespace {

using Argument = TensorArgument;

// Every tensor that a launch points to. A call with any other has no key.
constexpr Argument kTensors[] = {
    {"q", offsetof(ForwardParams, q.ptr),
     Argument::kGivesDevice | Argument::kAligned | Argument::kDifferentiable},
    {"k", offsetof(ForwardParams, k.ptr), Argument::kAligned | Argument::kDifferentiable},
    {"v", offsetof(ForwardParams, v.ptr), Argument::kAligned | Argument::kDifferentiable},
    {"s_aux", offsetof(ForwardParams, scores.sinks), Argument::kDifferentiable | Argument::kReadInFloat32},
    {"out", offsetof(ForwardParams, o.ptr), Argument::kAligned | Argument::kWritten},
    {"q_descale", offsetof(ForwardParams, q_descale.ptr)},
    {"k_descale", offsetof(ForwardParams, k_descale.ptr)},
    {"v_descale", offsetof(ForwardParams, v_descale.ptr)},
    {"k_mean", offsetof(ForwardParams, k_mean.ptr)},
    {"v_mean", offsetof(ForwardParams, v_mean.ptr)},
    {"v_channel_descale", offsetof(ForwardParams, v_channel_descale.ptr)},
    {"cu_seqlens_q", offsetof(ForwardParams, sequences.cu_seqlens_q)},
    {"cu_seqlens_k", offsetof(ForwardParams, sequences.cu_seqlens_k)},
    {"seqused_q", offsetof(ForwardParams, sequences.seqused_q)},
    {"seqused_k", offsetof(ForwardParams, sequences.seqused_k)},
    {"leftpad_k", offsetof(ForwardParams, sequences.leftpad_k)},
    {"kv_batch_idx", offsetof(ForwardParams, sequences.kv_batch_idx)},
    {"page_table", offsetof(ForwardParams, pages.page_table)},
    {"alibi_slopes", offsetof(ForwardParams, scores.alibi_slopes)},
    {"dropout_seed", offsetof(ForwardParams, dropout.seed)},
    {"scheduler_metadata", Argument::kElsewhere},  // the decode kernel's
};

static_assert(std::size(kTensors) <= CallKey::kMaxTensors);

}  // namespace

PlanCache::PlanCache(TorchTensors::Functions torch, py::object tile_count)
    : torch_(std::move(torch)), names_(kTensors), counters_(std::move(tile_count)) {}

py::object PlanCache::run(const CallArguments& call, bool want_lse, bool grad_enabled) {
    CallKey key = torch_.new_key();
    const std::shared_ptr<const CallPlan> found = read_call(key, names_, call) ? plans_.find(key) : nullptr;
    bool graph = false;
    if (found == nullptr || !found->by_address || !is_aligned(key) ||
        !needs_graph(key, torch_.reader(), grad_enabled, graph) || !can_write_out(key)) {
        return py::none();
    }
    const CallPlan& plan = *found;
    const CallKey::Tensor& q = *key.find(Argument::kGivesDevice);

    ForwardParams params = plan.params;
    const py::object converted = put_arguments(key, torch_, graph, params);
    py::object out = make_out(key, torch_, plan.out_like);
    params.o.ptr = reinterpret_cast<void*>(torch_.address_of(out));
    // The kernel leaves LSE out where there is none.
    py::object lse = want_lse || graph ? torch_.new_like(plan.lse_like) : py::none();
    params.lse.ptr = lse.is_none() ? nullptr : reinterpret_cast<float*>(torch_.address_of(lse));
    const std::uint64_t stream = torch_.current_stream(q);
    StreamMemory memory;
    if (plan.dynamic_schedule) {
        memory = counters_.of(q, torch_, *plan.kernel, plan.device, stream);
        params.scheduler.tile_count = reinterpret_cast<std::int32_t*>(memory.counters);
    }
    {
        const GilRelease release;
        launch_forward(*plan.kernel, plan.device, stream, params, plan.sm_margin);
    }
    torch_.mark_written(key);
    return py::make_tuple(std::move(out), std::move(lse), graph ? plan.options : py::none());
}

bool PlanCache::has_key(const CallArguments& call) {
    CallKey key = torch_.new_key();
    return read_call(key, names_, call);
}

void PlanCache::insert(const CallArguments& call, CallPlan plan, std::size_t most_plans) {
    CallKey key = torch_.new_key();
    if (!read_call(key, names_, call) || plans_.find(key) != nullptr) {
        return;
    }
    plan.by_address = points_to_arguments(key, plan.params) && !points_elsewhere(key, plan.params, kTensors);
    plans_.insert(key, std::move(plan), call.scope, most_plans);
}

}  // namespace flash8
