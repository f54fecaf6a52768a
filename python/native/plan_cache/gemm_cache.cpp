#include "plan_cache/gemm_cache.h"

#include <cstddef>
#include <iterator>
#include <utility>

#include "driver/gil.h"
#include "kernels/launch_gemm.h"

namespace py = pybind11;

namespace flash8 {

namespace {

using Argument = TensorArgument;

// Every tensor that a launch points to, by the names of scaled_mm and of grouped_scaled_mm, whose group_rows
// are its offs or masked_m. None is differentiable.
constexpr Argument kTensors[] = {
    {"a", offsetof(GemmParams, a), Argument::kGivesDevice | Argument::kAligned},
    {"b", offsetof(GemmParams, b), Argument::kAligned},
    {"scale_a", offsetof(GemmParams, scale_a.ptr)},
    {"scale_b", offsetof(GemmParams, scale_b.ptr)},
    {"bias", offsetof(GemmParams, bias)},
    {"scale_result", offsetof(GemmParams, scale_result)},
    {"group_rows", offsetof(GemmParams, group_rows)},
    {"out", offsetof(GemmParams, out), Argument::kWritten},
};

static_assert(std::size(kTensors) <= CallKey::kMaxTensors);

}  // namespace

GemmCache::GemmCache(TorchTensors::Functions torch) : torch_(std::move(torch)), names_(kTensors) {}

py::object GemmCache::run(const CallArguments& call) {
    CallKey key = torch_.new_key();
    const std::shared_ptr<const GemmPlan> plan = read_call(key, names_, call) ? plans_.find(key) : nullptr;
    bool graph = false;
    if (plan == nullptr || !is_aligned(key) || !needs_graph(key, torch_.reader(), true, graph) ||
        !can_write_out(key)) {
        return py::none();
    }

    GemmParams params = plan->params;
    put_arguments(key, torch_, false, params);
    py::object out = make_out(key, torch_, plan->out_like);
    params.out = reinterpret_cast<void*>(torch_.address_of(out));
    const std::uint64_t stream = torch_.current_stream(*key.find(Argument::kGivesDevice));
    {
        const GilRelease release;
        launch_gemm(*plan->kernel, plan->device, stream, params);
    }
    torch_.mark_written(key);
    return out;
}

bool GemmCache::has_key(const CallArguments& call) {
    CallKey key = torch_.new_key();
    return read_call(key, names_, call);
}

void GemmCache::insert(const CallArguments& call, GemmPlan plan, std::size_t most_plans) {
    CallKey key = torch_.new_key();
    if (read_call(key, names_, call) && points_to_arguments(key, plan.params) &&
        !points_elsewhere(key, plan.params, kTensors)) {
        plans_.insert(key, std::move(plan), call.scope, most_plans);
    }
}

}  // namespace flash8
