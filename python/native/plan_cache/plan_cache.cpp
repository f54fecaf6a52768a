#include "plan_cache/plan_cache.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "driver/gil.h"
#include "kernels/launch_forward.h"

namespace py = pybind11;

namespace flash8 {

namespace {

// Positions of arguments: those of the inputs, then the options.
constexpr std::size_t kQ = 0;
constexpr std::size_t kV = 2;
constexpr std::size_t kSinks = 4;
constexpr std::size_t kOut = 5;
constexpr std::size_t kInputs = 6;

constexpr std::size_t kNowhere = ~std::size_t{0};
constexpr std::uintptr_t kAddressUnit = 16;
constexpr std::int64_t kSinkBytes = sizeof(float);

struct Place {
    const char* argument;
    std::size_t offset;
};

// Where the launch takes the address of an argument from. Calls with any other tensor are not cached.
constexpr std::array<Place, kInputs> kInputPlaces{{
    {"q", offsetof(ForwardParams, q.ptr)},
    {"k", offsetof(ForwardParams, k.ptr)},
    {"v", offsetof(ForwardParams, v.ptr)},
    {"qv", kNowhere},
    {"s_aux", offsetof(ForwardParams, scores.sinks)},
    {"out", offsetof(ForwardParams, o.ptr)},
}};
constexpr Place kOptionPlaces[] = {
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
};

std::size_t option_place(const std::string& name) {
    const auto* const found = std::find_if(std::begin(kOptionPlaces), std::end(kOptionPlaces),
                                           [&](const Place& place) { return name == place.argument; });
    return found == std::end(kOptionPlaces) ? kNowhere : found->offset;
}

bool is_within(std::size_t offset) {
    return offset <= sizeof(ForwardParams) - sizeof(std::uintptr_t);
}

void put_address(ForwardParams& params, std::size_t offset, std::uintptr_t address) {
    if (!is_within(offset)) {
        throw std::logic_error("forward: a cached call has a tensor without a place");
    }
    std::memcpy(reinterpret_cast<char*>(&params) + offset, &address, sizeof(address));
}

std::uintptr_t address_at(const ForwardParams& params, std::size_t offset) {
    std::uintptr_t address = 0;
    if (!is_within(offset)) {
        return address;
    }
    std::memcpy(&address, reinterpret_cast<const char*>(&params) + offset, sizeof(address));
    return address;
}

// Whether TMA can read q, k and v from where they lie, and the epilogue can write `out`.
bool is_aligned(const CallKey& call) {
    return std::all_of(call.begin(), call.end(), [](const CallKey::Tensor& tensor) {
        return (tensor.argument > kV && tensor.argument != kOut) || tensor.view.address % kAddressUnit == 0;
    });
}

// The kernel reads sinks in fp32; they may come in the type of q.
bool is_converted(const CallKey::Tensor& tensor) {
    return tensor.argument == kSinks && tensor.view.element_bytes != kSinkBytes;
}

bool is_differentiable(const CallKey::Tensor& tensor) {
    return tensor.argument < kOut;
}

// Whether a byte between the first and the last of one is also that of the other: so do tensors meet whose
// storages do not know of each other, as DLPack and NumPy make them.
bool spans_meet(const TensorView& a, const TensorView& b) {
    return a.address < b.end_address() && b.address < a.end_address();
}

const CallKey::Tensor* find_out(const CallKey& call) {
    return std::find_if(call.begin(), call.end(), [](const auto& tensor) { return tensor.argument == kOut; });
}

}  // namespace

PlanCache::PlanCache(Torch torch, const std::vector<std::string>& option_names)
    : torch_(std::move(torch)), reader_(torch_.exchange_api) {
    for (const Place& place : kInputPlaces) {
        places_.push_back(place.offset);
    }
    for (const std::string& name : option_names) {
        places_.push_back(option_place(name));
    }
}

py::object PlanCache::run(const CallArguments& arguments, bool want_lse, bool grad_enabled) {
    CallKey call = new_key();
    // Shared: other threads may forget it while torch's functions, called below, let them run.
    const std::shared_ptr<const CachedPlan> cached = read(call, arguments) ? find(call) : nullptr;
    bool graph = false;
    if (cached == nullptr || !cached->repeatable || !is_aligned(call) ||
        !needs_graph(call, grad_enabled, graph) || !can_write_out(call)) {
        return py::none();
    }
    const CallPlan& plan = cached->plan;

    ForwardParams params = plan.params;
    const py::object sinks = put_arguments(call, graph, params);
    py::object out = make_out(call, plan);
    params.o.ptr = reinterpret_cast<void*>(address_of(out));
    // The kernel leaves LSE out where there is none.
    py::object lse = want_lse || graph ? torch_.empty_like(plan.lse_like) : py::none();
    params.lse.ptr = lse.is_none() ? nullptr : reinterpret_cast<float*>(address_of(lse));
    const std::uint64_t stream = current_stream(call);
    py::object tile_count;
    if (plan.dynamic_schedule) {
        tile_count = counter(call, plan, stream);
        params.scheduler.tile_count = reinterpret_cast<std::int32_t*>(address_of(tile_count));
    }
    {
        const GilRelease release;
        launch_forward(*plan.kernel, plan.device, stream, params, plan.sm_margin);
    }
    return py::make_tuple(std::move(out), std::move(lse), graph ? plan.note : py::none());
}

bool PlanCache::contains(const CallArguments& arguments) const {
    CallKey call = new_key();
    return read(call, arguments) && find(call) != nullptr;
}

void PlanCache::insert(const CallArguments& arguments, CallPlan plan, std::size_t most_plans) {
    CallKey call = new_key();
    if (!read(call, arguments)) {
        return;
    }
    const bool points_to_arguments =
        std::all_of(call.begin(), call.end(), [&](const CallKey::Tensor& tensor) {
            const std::size_t place = place_of(tensor);
            return place != kNowhere &&
                   (is_converted(tensor) || address_at(plan.params, place) == tensor.view.address);
        });
    if (plans_.size() >= most_plans) {
        clear();
    }
    auto scope = py::reinterpret_borrow<py::object>(arguments.scope);
    plans_[call.bytes()] = std::make_shared<const CachedPlan>(
        CachedPlan{std::move(plan), points_to_arguments, std::move(scope)});
}

void PlanCache::clear() {
    // What they hold may run Python code as it goes, which must find the table in order.
    const auto forgotten = std::exchange(plans_, {});
}

std::size_t PlanCache::place_of(const CallKey::Tensor& tensor) const {
    return tensor.argument < places_.size() ? places_[tensor.argument] : kNowhere;
}

CallKey PlanCache::new_key() const {
    return {reader_, {torch_.tensor_types[0].ptr(), torch_.tensor_types[1].ptr()}};
}

bool PlanCache::read(CallKey& call, const CallArguments& arguments) const {
    const auto inputs = static_cast<std::size_t>(PyTuple_GET_SIZE(arguments.inputs.ptr()));
    const auto options = static_cast<std::size_t>(PyTuple_GET_SIZE(arguments.options.ptr()));
    if (inputs != kInputs || inputs + options != places_.size()) {
        return false;
    }
    call.add_identity(arguments.scope.ptr());
    for (const py::tuple* const part : {&arguments.inputs, &arguments.options}) {
        const Py_ssize_t count = PyTuple_GET_SIZE(part->ptr());
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (!call.add(PyTuple_GET_ITEM(part->ptr(), i))) {
                return false;
            }
        }
    }
    // Every launch takes its device and its stream from q, the first of all tensors.
    return call.add_plain(arguments.window.ptr()) && call.size() > 0 && call.begin()->argument == kQ;
}

std::shared_ptr<const PlanCache::CachedPlan> PlanCache::find(const CallKey& call) const {
    const auto found = plans_.find(call.bytes());
    return found == plans_.end() ? nullptr : found->second;
}

// False where the whole way has to say what is wrong: with a gradient for a tensor that has none.
bool PlanCache::needs_graph(const CallKey& call, bool grad_enabled, bool& needed) const {
    for (const CallKey::Tensor& tensor : call) {
        const bool differentiable = is_differentiable(tensor);
        if (differentiable && (needed || !grad_enabled)) {
            continue;
        }
        if (reader_.requires_grad(tensor.object)) {
            if (!differentiable) {
                return false;
            }
            needed = true;
        }
    }
    return !needed || find_out(call) == call.end();
}

// Whether there is no `out`, or it shares memory with no other tensor of the call: neither a storage nor
// bytes.
bool PlanCache::can_write_out(const CallKey& call) const {
    const CallKey::Tensor* const out = find_out(call);
    if (out == call.end()) {
        return true;
    }
    const std::uintptr_t written = reader_.storage(out->object, out->view);
    return std::none_of(call.begin(), call.end(), [&](const CallKey::Tensor& tensor) {
        return &tensor != out &&
               (spans_meet(tensor.view, out->view) || reader_.storage(tensor.object, tensor.view) == written);
    });
}

// Gives what the parameters point to besides the arguments, to be held until the launch.
py::object PlanCache::put_arguments(const CallKey& call, bool graph, ForwardParams& params) const {
    py::object sinks;
    for (const CallKey::Tensor& tensor : call) {
        std::uintptr_t address = tensor.view.address;
        if (is_converted(tensor)) {
            sinks = py::reinterpret_borrow<py::object>(tensor.object);
            sinks = (graph ? sinks.attr("detach")() : sinks).attr("float")();
            address = address_of(sinks);
        }
        put_address(params, place_of(tensor), address);
    }
    return sinks;
}

py::object PlanCache::make_out(const CallKey& call, const CallPlan& plan) const {
    const CallKey::Tensor* const given = find_out(call);
    return given != call.end() ? py::reinterpret_borrow<py::object>(given->object)
                               : torch_.empty_like(plan.out_like);
}

std::uint64_t PlanCache::current_stream(const CallKey& call) const {
    const CallKey::Tensor& q = *call.begin();
    if (reader_.has_streams()) {
        return reader_.stream(q.view.device);
    }
    return torch_.current_stream(py::handle(q.object)).cast<std::uint64_t>();
}

// A launch that runs uses its stream's counter, which never changes; one that is captured gets its own.
py::object PlanCache::counter(const CallKey& call, const CallPlan& plan, std::uint64_t stream) {
    const CallKey::Tensor& q = *call.begin();
    const auto ask = [&](bool captured) {
        return torch_.tile_count(py::handle(q.object).attr("device"), stream, captured);
    };
    if (plan.kernel->is_captured(plan.device, stream)) {
        return ask(true);
    }
    const unsigned long thread = stream == cu::kStreamPerThread ? PyThread_get_thread_ident() : 0;
    const CounterKey key{q.view.device.type, q.view.device.id, stream, thread};
    const auto found = counters_.find(key);
    return found != counters_.end() ? found->second : counters_.emplace(key, ask(false)).first->second;
}

std::uintptr_t PlanCache::address_of(const py::object& tensor) const {
    TensorView view;
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    const bool known = type == torch_.tensor_types[0].ptr() || type == torch_.tensor_types[1].ptr();
    if (!known || !reader_.read(tensor.ptr(), view)) {
        throw std::runtime_error("forward: torch gave a tensor without memory");
    }
    return view.address;
}

}  // namespace flash8
