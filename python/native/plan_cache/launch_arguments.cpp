#include "plan_cache/launch_arguments.h"

#include <algorithm>

#include "driver/driver_api.h"

namespace py = pybind11;

namespace flash8 {

namespace {

constexpr std::uintptr_t kAddressUnit = 16;
constexpr std::int64_t kFloat32Bytes = sizeof(float);

using Argument = TensorArgument;

}  // namespace

bool spans_meet(const TensorView& a, const TensorView& b) {
    return a.address < b.end_address() && b.address < a.end_address();
}

bool read_call(CallKey& key, ArgumentNames& names, const CallArguments& call) {
    key.add_identity(call.scope.ptr());
    std::size_t number = ArgumentNames::kNone;
    Py_ssize_t position = 0;
    PyObject* name = nullptr;
    PyObject* value = nullptr;
    while (PyDict_Next(call.arguments.ptr(), &position, &name, &value) != 0) {
        if (value == Py_None && call.has_all_names) {
            continue;
        }
        number = names.number(name, number);
        if (number == ArgumentNames::kNone || !key.add(number, names.tensor(number), value)) {
            return false;
        }
    }
    return key.find(Argument::kGivesDevice) != nullptr;
}

bool read_call(CallKey& key, ArgumentNames& names, const CallKeywords& call) {
    key.add_identity(call.scope.ptr());
    std::size_t number = ArgumentNames::kNone;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call.names); ++i) {
        if (call.values[i] == Py_None) {
            continue;
        }
        number = names.number(PyTuple_GET_ITEM(call.names, i), number);
        if (number == ArgumentNames::kNone || !key.add(number, names.tensor(number), call.values[i])) {
            return false;
        }
    }
    return key.find(Argument::kGivesDevice) != nullptr;
}

bool is_aligned(const CallKey& key) {
    return std::all_of(key.begin(), key.end(), [](const CallKey::Tensor& tensor) {
        return !tensor.argument->has(Argument::kAligned) || tensor.view.address % kAddressUnit == 0;
    });
}

bool is_converted(const CallKey::Tensor& tensor) {
    return tensor.argument->has(Argument::kReadInFloat32) && tensor.view.element_bytes != kFloat32Bytes;
}

bool can_write_out(const CallKey& key) {
    const CallKey::Tensor* const out = key.find(Argument::kWritten);
    if (out == nullptr) {
        return true;
    }
    return std::none_of(key.begin(), key.end(), [&](const CallKey::Tensor& tensor) {
        return &tensor != out && spans_meet(tensor.view, out->view);
    });
}

bool needs_graph(const CallKey& key, const TensorReader& reader, bool grad_enabled, bool& needed) {
    for (const CallKey::Tensor& tensor : key) {
        const bool differentiable = tensor.argument->has(Argument::kDifferentiable);
        if (differentiable && (needed || !grad_enabled)) {
            continue;
        }
        if (reader.requires_grad(tensor.object)) {
            if (!differentiable) {
                return false;
            }
            needed = true;
        }
    }
    return !needed || key.find(Argument::kWritten) == nullptr;
}

py::object make_out(const CallKey& key, const TorchTensors& torch, const py::object& out_like) {
    const CallKey::Tensor* const given = key.find(Argument::kWritten);
    return given != nullptr ? py::reinterpret_borrow<py::object>(given->object) : torch.new_like(out_like);
}

StreamMemory StreamMemories::ask(const CallKey::Tensor& q, const TorchTensors& torch, std::uint64_t stream,
                                 bool captured, std::size_t bytes) const {
    const py::object where = py::handle(q.object).attr("device");
    if (bytes == 0) {
        py::object counters = get_(where, stream, captured);
        const std::uintptr_t address = torch.address_of(counters);
        return {std::move(counters), address};
    }
    const py::tuple both = get_(where, stream, captured, bytes);
    return {both, torch.address_of(both[0]), torch.address_of(both[1]), bytes};
}

StreamMemory StreamMemories::of(const CallKey::Tensor& q, const TorchTensors& torch, const Kernel& kernel,
                                int device, std::uint64_t stream, std::size_t bytes) {
    if (kernel.is_captured(device, stream)) {
        return ask(q, torch, stream, true, bytes);
    }
    const unsigned long thread = stream == cu::kStreamPerThread ? PyThread_get_thread_ident() : 0;
    const Key key{q.view.device.type, q.view.device.id, stream, thread};
    const auto found = kept_.find(key);
    if (found != kept_.end() && found->second.scratch_bytes >= bytes) {
        return found->second;
    }
    // Launches before this one go on in what is dropped here: it is freed in the order of their stream.
    StreamMemory memory = ask(q, torch, stream, false, bytes);
    kept_[key] = memory;
    return memory;
}

}  // namespace flash8
