#include "plan_cache/torch_tensors.h"

#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace flash8 {

TorchTensors::TorchTensors(Functions functions)
    : functions_(std::move(functions)), reader_(functions_.exchange_api) {}

CallKey TorchTensors::new_key() const {
    return {reader_, {functions_.tensor_types[0].ptr(), functions_.tensor_types[1].ptr()}};
}

py::object TorchTensors::new_like(const py::object& like) const {
    PyObject* const made = PyObject_CallOneArg(functions_.empty_like.ptr(), like.ptr());
    if (made == nullptr) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(made);
}

std::uintptr_t TorchTensors::address_of(const py::object& tensor) const {
    TensorView view;
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    const bool known = type == functions_.tensor_types[0].ptr() || type == functions_.tensor_types[1].ptr();
    if (!known || !reader_.read(tensor.ptr(), view, true)) {
        throw std::runtime_error("plan cache: torch gave a tensor without memory");
    }
    return view.address;
}

std::uint64_t TorchTensors::current_stream(const CallKey::Tensor& tensor) const {
    if (reader_.has_streams()) {
        return reader_.stream(tensor.view.device);
    }
    return functions_.current_stream(py::handle(tensor.object)).cast<std::uint64_t>();
}

}  // namespace flash8
