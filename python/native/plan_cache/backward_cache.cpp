#include "plan_cache/backward_cache.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "driver/gil.h"

namespace py = pybind11;

namespace flash8 {

namespace {

using Argument = TensorArgument;

constexpr std::size_t kQv = 3;  // among what is saved; no kernel reads it

// What is saved of every call, in its order. There is no tensor for qv.
constexpr Argument kSaved[] = {
    {"q", offsetof(BackwardParams, q.ptr), Argument::kGivesDevice | Argument::kAligned},
    {"k", offsetof(BackwardParams, k.ptr), Argument::kAligned},
    {"v", offsetof(BackwardParams, v.ptr), Argument::kAligned},
    {"qv", 0},
    {"s_aux", offsetof(BackwardParams, scores.sinks)},
    {"out", offsetof(BackwardParams, o.ptr), Argument::kAligned},
    {"lse", offsetof(BackwardParams, lse.ptr)},
};

constexpr Argument kIncoming[] = {
    {"dout", offsetof(BackwardParams, dout.ptr), Argument::kAligned},
    {"dlse", offsetof(BackwardParams, dlse.ptr)},
};

// The options that are tensors. A call with any other has no key.
constexpr Argument kOptions[] = {
    {"cu_seqlens_q", offsetof(BackwardParams, sequences.cu_seqlens_q)},
    {"cu_seqlens_k", offsetof(BackwardParams, sequences.cu_seqlens_k)},
    {"seqused_q", offsetof(BackwardParams, sequences.seqused_q)},
    {"seqused_k", offsetof(BackwardParams, sequences.seqused_k)},
    {"alibi_slopes", offsetof(BackwardParams, scores.alibi_slopes)},
    {"dropout_seed", offsetof(BackwardParams, dropout.seed)},
};

// Numbers of arguments in a key, each kind from its own on.
constexpr std::size_t kFirstIncoming = 16;
constexpr std::size_t kFirstOption = 32;
constexpr std::size_t kMostFields = 64;

// Moves the parts of the workspace, of which row_stats is the first, to where it begins now.
void move_workspace(BackwardParams& params, std::uintptr_t begin) {
    const auto former = reinterpret_cast<std::uintptr_t>(params.row_stats);
    for (const std::size_t place :
         {offsetof(BackwardParams, row_stats), offsetof(BackwardParams, dq_accum),
          offsetof(BackwardParams, dq_semaphore), offsetof(BackwardParams, dsinks_partial),
          offsetof(BackwardParams, dkv_partial), offsetof(BackwardParams, q16),
          offsetof(BackwardParams, key_mean)}) {
        const std::uintptr_t address = address_at(params, place);
        put_address(params, place, address == 0 ? 0 : address - former + begin);
    }
}

const Argument* option_called(const py::object& name) {
    const auto* const found =
        std::find_if(std::begin(kOptions), std::end(kOptions),
                     [&](const Argument& option) { return name.equal(py::str(option.name)); });
    return found == std::end(kOptions) ? nullptr : found;
}

}  // namespace

BackwardCache::BackwardCache(TorchTensors::Functions torch, const py::tuple& field_names)
    : torch_(std::move(torch)) {
    if (field_names.size() > kMostFields) {
        throw std::invalid_argument("plan cache: there are too many options");
    }
    for (const py::handle name : field_names) {
        field_names_.push_back(py::reinterpret_borrow<py::object>(name));
        fields_.push_back(option_called(field_names_.back()));
    }
}

py::object BackwardCache::run(const BackwardCall& call) const {
    CallKey key = torch_.new_key();
    const std::shared_ptr<const BackwardPlan> found = read(key, call) ? plans_.find(key) : nullptr;
    if (found == nullptr || !is_aligned(key)) {
        return py::none();
    }
    const BackwardPlan& plan = *found;
    BackwardParams params = plan.params;
    for (const CallKey::Tensor& tensor : key) {
        put_address(params, tensor.argument->place, tensor.view.address);
    }
    const auto made = [&](const py::object& like, std::size_t place) {
        py::object tensor = torch_.new_like(like);
        put_address(params, place, torch_.address_of(tensor));
        return tensor;
    };
    const py::object workspace = torch_.new_like(plan.workspace_like);
    const std::uintptr_t address = torch_.address_of(workspace);
    move_workspace(params, (address + kWorkspaceUnit - 1) / kWorkspaceUnit * kWorkspaceUnit);
    py::object dq = made(plan.dq_like, offsetof(BackwardParams, dq.ptr));
    py::object dk = made(plan.dk_like, offsetof(BackwardParams, dk.ptr));
    py::object dv = made(plan.dv_like, offsetof(BackwardParams, dv.ptr));
    py::object dsinks =
        plan.dsinks_like.is_none() ? py::none() : made(plan.dsinks_like, offsetof(BackwardParams, dsinks));
    const std::uint64_t stream = torch_.current_stream(*key.find(Argument::kGivesDevice));
    {
        const GilRelease release;
        launch_backward({*plan.kernels[0], *plan.kernels[1], *plan.kernels[2]}, plan.device, stream, params);
    }
    return py::make_tuple(std::move(dq), std::move(dk), std::move(dv), std::move(dsinks));
}

void BackwardCache::insert(const BackwardCall& call, BackwardPlan plan, std::size_t most_plans) {
    CallKey key = torch_.new_key();
    const bool by_address = read(key, call) && std::all_of(key.begin(), key.end(), [&](const auto& tensor) {
                                return address_at(plan.params, tensor.argument->place) == tensor.view.address;
                            });
    if (by_address) {
        plans_.insert(key, std::move(plan), call.scope, most_plans);
    }
}

// False: the call has no key.
bool BackwardCache::read(CallKey& key, const BackwardCall& call) const {
    // Without dO there is a tensor of zeros that nobody gave.
    if (call.options.size() != fields_.size() || call.saved.size() != std::size(kSaved) + call.names.size() ||
        call.incoming.size() != std::size(kIncoming) || PyTuple_GET_ITEM(call.incoming.ptr(), 0) == Py_None) {
        return false;
    }
    std::array<PyObject*, kMostFields> options{};
    for (std::size_t i = 0; i < fields_.size(); ++i) {
        options[i] = PyTuple_GET_ITEM(call.options.ptr(), i);
    }
    for (std::size_t i = 0; i < call.names.size(); ++i) {
        const std::optional<std::size_t> field = field_of(PyTuple_GET_ITEM(call.names.ptr(), i));
        if (!field) {
            return false;
        }
        options[*field] = PyTuple_GET_ITEM(call.saved.ptr(), std::size(kSaved) + i);
    }
    key.add_identity(call.scope.ptr());
    key.add(kFirstIncoming - 1, nullptr, call.deterministic ? Py_True : Py_False);
    for (std::size_t i = 0; i < std::size(kSaved); ++i) {
        if (!key.add(i, i == kQv ? nullptr : &kSaved[i], PyTuple_GET_ITEM(call.saved.ptr(), i))) {
            return false;
        }
    }
    for (std::size_t i = 0; i < std::size(kIncoming); ++i) {
        if (!key.add(kFirstIncoming + i, &kIncoming[i], PyTuple_GET_ITEM(call.incoming.ptr(), i))) {
            return false;
        }
    }
    for (std::size_t i = 0; i < fields_.size(); ++i) {
        if (!key.add(kFirstOption + i, fields_[i], options[i])) {
            return false;
        }
    }
    return key.find(Argument::kGivesDevice) != nullptr;
}

// Names are the objects that Options has.
std::optional<std::size_t> BackwardCache::field_of(PyObject* name) const {
    const auto found = std::find_if(field_names_.begin(), field_names_.end(),
                                    [&](const py::object& field) { return field.ptr() == name; });
    if (found == field_names_.end()) {
        return std::nullopt;
    }
    return static_cast<std::size_t>(found - field_names_.begin());
}

}  // namespace flash8
