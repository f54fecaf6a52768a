#include "plan_cache/plan_cache.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "driver/gil.h"
#include "kernels/launch_forward.h"

namespace py = pybind11;

namespace flash8 {

namespace {

constexpr std::uintptr_t kAddressUnit = 16;
constexpr std::int64_t kFloat32Bytes = sizeof(float);

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
    {"alibi_slopes", offsetof(ForwardParams, scores.alibi_slopes)},
    {"dropout_seed", offsetof(ForwardParams, dropout.seed)},
};

void put_address(ForwardParams& params, std::size_t place, std::uintptr_t address) {
    std::memcpy(reinterpret_cast<char*>(&params) + place, &address, sizeof(address));
}

std::uintptr_t address_at(const ForwardParams& params, std::size_t place) {
    std::uintptr_t address = 0;
    std::memcpy(&address, reinterpret_cast<const char*>(&params) + place, sizeof(address));
    return address;
}

bool is_aligned(const CallKey& key) {
    return std::all_of(key.begin(), key.end(), [](const CallKey::Tensor& tensor) {
        return !tensor.argument->has(Argument::kAligned) || tensor.view.address % kAddressUnit == 0;
    });
}

// Whether the kernel reads a copy in fp32, which is made for each launch.
bool is_converted(const CallKey::Tensor& tensor) {
    return tensor.argument->has(Argument::kReadInFloat32) && tensor.view.element_bytes != kFloat32Bytes;
}

// Whether a byte between the first and the last of one is also that of the other: so do tensors meet whose
// storages do not know of each other, as DLPack and NumPy make them.
bool spans_meet(const TensorView& a, const TensorView& b) {
    return a.address < b.end_address() && b.address < a.end_address();
}

}  // namespace

PlanCache::PlanCache(TorchTensors::Functions torch, py::object tile_count)
    : torch_(std::move(torch)), tile_count_(std::move(tile_count)), names_(kTensors) {}

py::object PlanCache::run(const CallArguments& call, bool want_lse, bool grad_enabled) {
    CallKey key = torch_.new_key();
    // Shared: other threads may drop it while torch's functions, called below, let them run.
    const std::shared_ptr<const CachedPlan> cached = read(key, call) ? find(key) : nullptr;
    bool graph = false;
    if (cached == nullptr || !cached->by_address || !is_aligned(key) ||
        !needs_graph(key, grad_enabled, graph) || !can_write_out(key)) {
        return py::none();
    }
    const CallPlan& plan = cached->plan;
    const CallKey::Tensor& q = *key.find(Argument::kGivesDevice);

    ForwardParams params = plan.params;
    const py::object converted = put_arguments(key, graph, params);
    py::object out = make_out(key, plan);
    params.o.ptr = reinterpret_cast<void*>(torch_.address_of(out));
    // The kernel leaves LSE out where there is none.
    py::object lse = want_lse || graph ? torch_.new_like(plan.lse_like) : py::none();
    params.lse.ptr = lse.is_none() ? nullptr : reinterpret_cast<float*>(torch_.address_of(lse));
    const std::uint64_t stream = torch_.current_stream(q);
    py::object tile_count;
    if (plan.dynamic_schedule) {
        tile_count = counter(q, plan, stream);
        params.scheduler.tile_count = reinterpret_cast<std::int32_t*>(torch_.address_of(tile_count));
    }
    {
        const GilRelease release;
        launch_forward(*plan.kernel, plan.device, stream, params, plan.sm_margin);
    }
    return py::make_tuple(std::move(out), std::move(lse), graph ? plan.options : py::none());
}

bool PlanCache::has_key(const CallArguments& call) {
    CallKey key = torch_.new_key();
    return read(key, call);
}

void PlanCache::insert(const CallArguments& call, CallPlan plan, std::size_t most_plans) {
    CallKey key = torch_.new_key();
    if (!read(key, call) || find(key) != nullptr) {
        return;
    }
    const bool by_address = std::all_of(key.begin(), key.end(), [&](const CallKey::Tensor& tensor) {
        return is_converted(tensor) || address_at(plan.params, tensor.argument->place) == tensor.view.address;
    });
    if (plans_.size() >= most_plans) {
        clear();
    }
    auto scope = py::reinterpret_borrow<py::object>(call.scope);
    plans_[key.bytes()] =
        std::make_shared<const CachedPlan>(CachedPlan{std::move(plan), by_address, std::move(scope)});
}

void PlanCache::clear() {
    // What they hold may run Python code as it goes, which must find the table in order.
    const auto dropped = std::exchange(plans_, {});
}

// False: the call has no key.
bool PlanCache::read(CallKey& key, const CallArguments& call) {
    key.add_identity(call.scope.ptr());
    std::size_t number = ArgumentNames::kNone;
    Py_ssize_t position = 0;
    PyObject* name = nullptr;
    PyObject* value = nullptr;
    while (PyDict_Next(call.arguments.ptr(), &position, &name, &value) != 0) {
        number = names_.number(name, number);
        if (number == ArgumentNames::kNone || !key.add(number, names_.tensor(number), value)) {
            return false;
        }
    }
    return key.find(Argument::kGivesDevice) != nullptr;
}

std::shared_ptr<const PlanCache::CachedPlan> PlanCache::find(const CallKey& key) const {
    const auto found = plans_.find(key.bytes());
    return found == plans_.end() ? nullptr : found->second;
}

// False where the checks of a miss have to say what is wrong: with a gradient for a tensor that has none.
bool PlanCache::needs_graph(const CallKey& key, bool grad_enabled, bool& needed) const {
    for (const CallKey::Tensor& tensor : key) {
        const bool differentiable = tensor.argument->has(Argument::kDifferentiable);
        if (differentiable && (needed || !grad_enabled)) {
            continue;
        }
        if (torch_.reader().requires_grad(tensor.object)) {
            if (!differentiable) {
                return false;
            }
            needed = true;
        }
    }
    return !needed || key.find(Argument::kWritten) == nullptr;
}

// Whether there is no `out`, or it shares memory with no other tensor of the call: neither a storage nor
// bytes.
bool PlanCache::can_write_out(const CallKey& key) const {
    const CallKey::Tensor* const out = key.find(Argument::kWritten);
    if (out == nullptr) {
        return true;
    }
    const std::uintptr_t written = torch_.reader().storage(out->object, out->view);
    return std::none_of(key.begin(), key.end(), [&](const CallKey::Tensor& tensor) {
        return &tensor != out && (spans_meet(tensor.view, out->view) ||
                                  torch_.reader().storage(tensor.object, tensor.view) == written);
    });
}

// Gives what the parameters point to besides the arguments, to be held until the launch.
py::object PlanCache::put_arguments(const CallKey& key, bool graph, ForwardParams& params) const {
    py::object converted;
    for (const CallKey::Tensor& tensor : key) {
        std::uintptr_t address = tensor.view.address;
        if (is_converted(tensor)) {
            converted = py::reinterpret_borrow<py::object>(tensor.object);
            converted = (graph ? converted.attr("detach")() : converted).attr("float")();
            address = torch_.address_of(converted);
        }
        put_address(params, tensor.argument->place, address);
    }
    return converted;
}

py::object PlanCache::make_out(const CallKey& key, const CallPlan& plan) const {
    const CallKey::Tensor* const given = key.find(Argument::kWritten);
    return given != nullptr ? py::reinterpret_borrow<py::object>(given->object)
                            : torch_.new_like(plan.out_like);
}

// A launch that runs uses its stream's counter, which never changes; one that is captured gets its own.
py::object PlanCache::counter(const CallKey::Tensor& q, const CallPlan& plan, std::uint64_t stream) {
    const auto ask = [&](bool captured) {
        return tile_count_(py::handle(q.object).attr("device"), stream, captured);
    };
    if (plan.kernel->is_captured(plan.device, stream)) {
        return ask(true);
    }
    const unsigned long thread = stream == cu::kStreamPerThread ? PyThread_get_thread_ident() : 0;
    const CounterKey key{q.view.device.type, q.view.device.id, stream, thread};
    const auto found = counters_.find(key);
    return found != counters_.end() ? found->second : counters_.emplace(key, ask(false)).first->second;
}

}  // namespace flash8
