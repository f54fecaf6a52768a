#include "plan_cache/tensor_reader.h"

#include <algorithm>

#include "plan_cache/objects.h"

namespace py = pybind11;

namespace flash8 {

namespace {

// Names of attributes as Python objects, made once: looking an attribute up by them makes nothing.
struct Names {
    static PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

    PyObject* requires_grad = intern("requires_grad");
    PyObject* is_neg = intern("is_neg");
    PyObject* data_ptr = intern("data_ptr");
    PyObject* dtype = intern("dtype");
    PyObject* element_size = intern("element_size");
    PyObject* is_cuda = intern("is_cuda");
    PyObject* is_cpu = intern("is_cpu");
    PyObject* get_device = intern("get_device");
    PyObject* shape = intern("shape");
    PyObject* stride = intern("stride");
};

const Names& names() {
    static const Names instance;
    return instance;
}

py::object attribute(PyObject* tensor, PyObject* name) {
    return steal(PyObject_GetAttr(tensor, name));
}

py::object call(PyObject* tensor, PyObject* method) {
    return steal(PyObject_CallMethodNoArgs(tensor, method));
}

bool is_true(const py::object& flag) {
    return flag.ptr() == Py_True;
}

std::int64_t integer(const py::object& value) {
    const long long number = PyLong_AsLongLong(value.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) {
        throw py::error_already_set();
    }
    return number;
}

// Whether `from` was a tuple of `count` integers, which `to` has now.
bool copy_integers(const py::object& from, Py_ssize_t count,
                   std::array<std::int64_t, TensorView::kMaxRank>& to) {
    if (PyTuple_Check(from.ptr()) == 0 || PyTuple_GET_SIZE(from.ptr()) != count) {
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        to[static_cast<std::size_t>(i)] =
            integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(from.ptr(), i)));
    }
    return true;
}

bool has_memory(const TensorView& view) {
    const auto* const end = view.sizes.begin() + view.rank;
    const bool known_device = view.device.type == dlpack::kCpu || view.device.type == dlpack::kCuda;
    return known_device && view.address != 0 && std::find(view.sizes.begin(), end, 0) == end;
}

}  // namespace

std::uintptr_t TensorView::end_address() const {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(rank); ++i) {
        last += (sizes[i] - 1) * strides[i];
    }
    return address + static_cast<std::uintptr_t>((last + 1) * element_bytes);
}

TensorReader::TensorReader(const py::object& exchange_api) {
    if (PyCapsule_IsValid(exchange_api.ptr(), dlpack::kCapsuleName) == 0) {
        return;
    }
    void* const table = PyCapsule_GetPointer(exchange_api.ptr(), dlpack::kCapsuleName);
    const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
    while (api != nullptr && api->major != dlpack::kMajorVersion) {
        api = api->older;
    }
    if (api != nullptr && api->borrow != nullptr && api->current_stream != nullptr) {
        api_ = api;
    }
}

// Only floating-point tensors are negated lazily.
bool TensorReader::is_integer(const TensorView& view) const {
    const std::uint64_t code = view.dtype & 0xff;
    return api_ != nullptr && (code == dlpack::kInt || code == dlpack::kUInt);
}

bool TensorReader::read(PyObject* tensor, TensorView& view, bool is_new) const {
    try {
        return (api_ != nullptr ? borrow(tensor, view) : read_attributes(tensor, view)) && has_memory(view) &&
               (is_new || is_integer(view) || !is_true(call(tensor, names().is_neg)));
    } catch (const py::error_already_set& error) {  // of a sparse or nested tensor, or on another device
        if (!error.matches(PyExc_Exception)) {
            throw;  // somebody interrupts
        }
        return false;
    }
}

bool TensorReader::borrow(PyObject* tensor, TensorView& view) const {
    dlpack::Tensor borrowed{};
    if (api_->borrow(tensor, &borrowed) != 0) {
        if (PyErr_Occurred() == nullptr) {
            return false;
        }
        throw py::error_already_set();
    }
    const bool known_rank = borrowed.ndim >= 0 && borrowed.ndim <= TensorView::kMaxRank;
    if (!known_rank || (borrowed.ndim > 0 && (borrowed.shape == nullptr || borrowed.strides == nullptr))) {
        return false;
    }
    const dlpack::DataType& dtype = borrowed.dtype;
    view.address = reinterpret_cast<std::uintptr_t>(borrowed.data) + borrowed.byte_offset;
    view.dtype = dtype.code | std::uint64_t{dtype.bits} << 8 | std::uint64_t{dtype.lanes} << 16;
    view.element_bytes = dtype.bits / 8;
    view.device = borrowed.device;
    view.rank = borrowed.ndim;
    std::copy_n(borrowed.shape, borrowed.ndim, view.sizes.begin());
    std::copy_n(borrowed.strides, borrowed.ndim, view.strides.begin());
    return true;
}

bool TensorReader::read_attributes(PyObject* tensor, TensorView& view) const {
    const py::object sizes = attribute(tensor, names().shape);
    const py::object strides = call(tensor, names().stride);
    const Py_ssize_t rank = PyTuple_Check(sizes.ptr()) != 0 ? PyTuple_GET_SIZE(sizes.ptr()) : -1;
    if (rank < 0 || rank > TensorView::kMaxRank || !copy_integers(sizes, rank, view.sizes) ||
        !copy_integers(strides, rank, view.strides)) {
        return false;
    }
    view.rank = static_cast<int>(rank);
    view.address = static_cast<std::uintptr_t>(integer(call(tensor, names().data_ptr)));
    // There is one object for every dtype.
    view.dtype = reinterpret_cast<std::uintptr_t>(attribute(tensor, names().dtype).ptr());
    view.element_bytes = integer(call(tensor, names().element_size));
    if (is_true(attribute(tensor, names().is_cuda))) {
        view.device = {dlpack::kCuda, static_cast<std::int32_t>(integer(call(tensor, names().get_device)))};
    } else if (is_true(attribute(tensor, names().is_cpu))) {
        view.device = {dlpack::kCpu, 0};
    } else {
        return false;
    }
    return true;
}

bool TensorReader::requires_grad(PyObject* tensor) const {
    return is_true(attribute(tensor, names().requires_grad));
}

std::uint64_t TensorReader::stream(const dlpack::Device& device) const {
    if (device.type == dlpack::kCpu) {
        return 0;
    }
    void* stream = nullptr;
    if (api_->current_stream(device.type, device.id, &stream) != 0) {
        throw py::error_already_set();
    }
    return reinterpret_cast<std::uintptr_t>(stream);
}

}  // namespace flash8
