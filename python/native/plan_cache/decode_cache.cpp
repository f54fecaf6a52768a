#include "plan_cache/decode_cache.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

#include "driver/gil.h"
#include "kernels/launch_append.h"
#include "kernels/launch_decode.h"
#include "plan_cache/objects.h"

namespace py = pybind11;

namespace flash8 {

namespace {

using Argument = TensorArgument;

// Every tensor that a launch points to, by flash_attn_with_kvcache's names. A call with any other has no key.
constexpr Argument kTensors[] = {
    {"q", offsetof(DecodeParams, q.ptr),
     Argument::kGivesDevice | Argument::kAligned | Argument::kDifferentiable},
    {"k_cache", offsetof(DecodeParams, k.ptr), Argument::kAligned | Argument::kDifferentiable},
    {"v_cache", offsetof(DecodeParams, v.ptr), Argument::kAligned | Argument::kDifferentiable},
    {"qv", offsetof(DecodeParams, qv.ptr), Argument::kAligned | Argument::kDifferentiable},
    {"s_aux", offsetof(DecodeParams, scores.sinks), Argument::kDifferentiable | Argument::kReadInFloat32},
    {"out", offsetof(DecodeParams, o.ptr), Argument::kAligned | Argument::kWritten},
    {"q_descale", offsetof(DecodeParams, q_descale.ptr)},
    {"k_descale", offsetof(DecodeParams, k_descale.ptr)},
    {"v_descale", offsetof(DecodeParams, v_descale.ptr)},
    {"k_mean", offsetof(DecodeParams, k_mean.ptr), Argument::kAligned},
    {"v_mean", offsetof(DecodeParams, v_mean.ptr), Argument::kAligned},
    {"cu_seqlens_q", offsetof(DecodeParams, sequences.cu_seqlens_q)},
    {"cache_seqlens", offsetof(DecodeParams, sequences.seqused_k)},
    {"cache_leftpad", offsetof(DecodeParams, sequences.leftpad_k)},
    {"cache_batch_idx", offsetof(DecodeParams, sequences.kv_batch_idx)},
    {"page_table", offsetof(DecodeParams, pages.page_table)},
    {"tree_mask", offsetof(DecodeParams, tree_mask)},
    {"scheduler_metadata", offsetof(DecodeParams, scheduler_metadata)},
    {"alibi_slopes", offsetof(DecodeParams, scores.alibi_slopes)},
    // Of a call that appends:
    {"k", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"v", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"rotary_cos", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"rotary_sin", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"q_norm_weight", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"k_norm_weight", Argument::kElsewhere, Argument::kAligned | Argument::kDifferentiable},
    {"rotary_seqlens", Argument::kElsewhere},
    {"cu_seqlens_k_new", Argument::kElsewhere},
};

static_assert(std::size(kTensors) <= CallKey::kMaxTensors);

constexpr std::size_t kQ = offsetof(DecodeParams, q.ptr);
constexpr std::size_t kLengths = offsetof(DecodeParams, sequences.seqused_k);

// The argument that belongs at a place.
const CallKey::Tensor* argument_at(const CallKey& key, std::size_t place) {
    return std::find_if(key.begin(), key.end(),
                        [&](const CallKey::Tensor& tensor) { return tensor.argument->place == place; });
}

// Attention reads the lengths and, where it is rotated, the Q at these addresses.
void lead_to(DecodeParams& params, bool rotates, std::uintptr_t q, std::uintptr_t lengths) {
    put_address(params, kLengths, lengths);
    if (rotates) {
        put_address(params, kQ, q);
    }
}

}  // namespace

DecodeCache::DecodeCache(TorchTensors::Functions torch, py::object kernels, py::object is_grad_enabled,
                         py::object workspace)
    : torch_(std::move(torch)),
      kernels_(std::move(kernels)),
      registry_("registry"),
      is_grad_enabled_(std::move(is_grad_enabled)),
      names_(kTensors),
      workspaces_(std::move(workspace)) {}

py::object DecodeCache::scope() const {
    return steal(PyObject_CallMethodNoArgs(kernels_.ptr(), registry_.ptr()));
}

py::object DecodeCache::run(PyObject* names, PyObject* const* values) {
    CallKey key = torch_.new_key();
    const py::object kernels = scope();
    if (!read_call(key, names_, CallKeywords{kernels, names, values})) {
        return py::none();
    }
    const bool grad_enabled = steal(PyObject_CallNoArgs(is_grad_enabled_.ptr())).ptr() == Py_True;
    bool graph = false;
    const std::shared_ptr<const DecodePlan> found = plans_.find(key);
    if (found == nullptr || !is_aligned(key) || !needs_graph(key, torch_.reader(), grad_enabled, graph) ||
        graph || !can_write_out(key) || (found->append && !found->append->may_write(key))) {
        return py::none();
    }
    const DecodePlan& plan = *found;
    const CallKey::Tensor& q = *key.find(Argument::kGivesDevice);

    DecodeParams params = plan.params;
    const py::object converted = put_arguments(key, torch_, false, params);
    std::vector<AppendPlan::Launch> appends;
    AppendPlan::Made made;
    if (plan.append) {
        made = plan.append->make(key, torch_, appends);
        if (plan.append->is_ahead()) {
            lead_to(params, plan.append->rotates(), made.rotated_address, made.lengths_address);
        } else {
            params.append = appends.front().params;
            appends.clear();
        }
    }
    py::object out = make_out(key, torch_, plan.out_like);
    params.o.ptr = reinterpret_cast<void*>(torch_.address_of(out));
    // The kernel leaves LSE out where there is none.
    py::object lse = plan.returns_lse ? torch_.new_like(plan.lse_like) : py::none();
    params.lse.ptr = lse.is_none() ? nullptr : reinterpret_cast<float*>(torch_.address_of(lse));
    const std::uint64_t stream = torch_.current_stream(q);
    const StreamMemory workspace =
        workspaces_.of(q, torch_, *plan.kernel, plan.device, stream, plan.partial_bytes);
    params.tickets = reinterpret_cast<std::int32_t*>(workspace.counters);
    params.partials = reinterpret_cast<float*>(workspace.scratch);
    {
        const GilRelease release;
        for (const AppendPlan::Launch& append : appends) {
            launch_append(*append.kernel, plan.device, stream, append.params);
        }
        launch_decode(*plan.kernel, plan.device, stream, params, plan.sm_margin);
    }
    if (plan.append) {
        const auto cache = [&](std::size_t place) { return py::handle(argument_at(key, place)->object); };
        torch_.mark_written(
            py::make_tuple(cache(offsetof(DecodeParams, k.ptr)), cache(offsetof(DecodeParams, v.ptr))));
    }
    torch_.mark_written(key);
    return py::make_tuple(std::move(out), std::move(lse));
}

bool DecodeCache::has_key(const py::dict& call) {
    CallKey key = torch_.new_key();
    return read_call(key, names_, {scope(), call, true});
}

void DecodeCache::insert(const py::dict& call, DecodePlan plan, std::size_t most_plans) {
    CallKey key = torch_.new_key();
    const py::object kernels = scope();
    if (!read_call(key, names_, {kernels, call, true}) || (plan.append && !plan.append->learn(key))) {
        return;
    }
    DecodeParams params = plan.params;
    if (plan.append && plan.append->is_ahead()) {  // what it has made is in the place of arguments
        const bool rotates = plan.append->rotates();
        if (address_at(params, kLengths) != plan.append->lengths_address() ||
            (rotates && address_at(params, kQ) != plan.append->rotated_address())) {
            return;
        }
        lead_to(params, rotates, argument_at(key, kQ)->view.address,
                argument_at(key, kLengths)->view.address);
    }
    if (!points_to_arguments(key, params) || points_elsewhere(key, params, kTensors)) {
        return;
    }
    plans_.insert(key, std::move(plan), kernels, most_plans);
}

}  // namespace flash8
