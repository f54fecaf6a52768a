#include "plan_cache/torch_tensors.h"

#include <stdexcept>
#include <utility>

#include "plan_cache/objects.h"

namespace py = pybind11;

namespace flash8 {

TorchTensors::TorchTensors(Functions functions)
    : functions_(std::move(functions)), reader_(functions_.exchange_api) {}

CallKey TorchTensors::new_key() const {
    return {reader_, {functions_.tensor_types[0].ptr(), functions_.tensor_types[1].ptr()}};
}

py::object TorchTensors::new_like(const py::object& like) const {
    return steal(PyObject_CallOneArg(functions_.empty_like.ptr(), like.ptr()));
}

void TorchTensors::mark_written(const CallKey& key) const {
    const CallKey::Tensor* const out = key.find(TensorArgument::kWritten);
    if (out != nullptr) {
        mark_written(py::make_tuple(py::handle(out->object)));
    }
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
