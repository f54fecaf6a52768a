#include "plan_cache/call_key.h"

#include <algorithm>
#include <cstddef>

namespace py = pybind11;

namespace flash8 {

namespace {

constexpr std::size_t kUsualBytes = 1024;  // one allocation serves most calls

bool is_scalar(PyObject* value) {
    return value == Py_None || Py_TYPE(value) == &PyBool_Type || Py_TYPE(value) == &PyLong_Type ||
           Py_TYPE(value) == &PyFloat_Type;
}

}  // namespace

py::object ArgumentNames::intern(const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
}

std::size_t ArgumentNames::number(PyObject* name, std::size_t previous) {
    const std::size_t expected = previous == kNone ? 0 : names_[previous].next;
    if (expected < names_.size() && names_[expected].text.ptr() == name) {
        return expected;
    }
    const std::size_t found = find(name);
    if (found != kNone && previous != kNone) {
        names_[previous].next = found;
    }
    return found;
}

std::size_t ArgumentNames::find(PyObject* name) {
    for (std::size_t i = 0; i < names_.size(); ++i) {
        if (names_[i].text.ptr() == name) {
            return i;
        }
    }
    if (PyUnicode_CheckExact(name) == 0) {
        return kNone;
    }
    for (std::size_t i = 0; i < names_.size(); ++i) {  // the same text in another object
        if (PyUnicode_Compare(name, names_[i].text.ptr()) == 0) {
            return i;
        }
    }
    if (names_.size() == kMostNames) {
        return kNone;
    }
    PyObject* text = Py_NewRef(name);
    PyUnicode_InternInPlace(&text);
    names_.push_back({py::reinterpret_steal<py::object>(text), nullptr});
    return names_.size() - 1;
}

CallKey::CallKey(const TensorReader& reader, const std::array<PyObject*, 2>& tensor_types)
    : reader_(reader), tensor_types_(tensor_types) {
    bytes_.reserve(kUsualBytes);
}

bool CallKey::add(std::size_t number, const TensorArgument* tensor, PyObject* value) {
    bytes_ += static_cast<char>(number);
    return add_value(value) || (tensor != nullptr && add_tensor(*tensor, value));
}

const CallKey::Tensor* CallKey::find(TensorArgument::Traits trait) const {
    const Tensor* const found =
        std::find_if(begin(), end(), [&](const Tensor& tensor) { return tensor.argument->has(trait); });
    return found == end() ? nullptr : found;
}

// Of a plain value. Every value begins with a tag that says what follows and how long it is, so different
// calls never give the same bytes.
bool CallKey::add_value(PyObject* value) {
    if (value == Py_None) {
        bytes_ += 'N';
    } else if (value == Py_True || value == Py_False) {
        bytes_ += value == Py_True ? 'T' : 'F';
    } else if (Py_TYPE(value) == &PyLong_Type) {
        return add_integer(value);
    } else if (Py_TYPE(value) == &PyFloat_Type) {
        const double number = PyFloat_AS_DOUBLE(value);
        append('f', &number, sizeof(number));
    } else if (Py_TYPE(value) == &PyTuple_Type) {
        const Py_ssize_t size = PyTuple_GET_SIZE(value);
        append('(', &size, sizeof(size));
        for (Py_ssize_t i = 0; i < size; ++i) {
            PyObject* const item = PyTuple_GET_ITEM(value, i);
            // Tensors are arguments of their own: in a tuple one would have no name.
            if (item == nullptr || !is_scalar(item) || !add_value(item)) {
                return false;
            }
        }
    } else {
        return false;
    }
    return true;
}

bool CallKey::add_integer(PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    append('i', &number, sizeof(number));
    return overflow == 0;
}

bool CallKey::add_tensor(const TensorArgument& argument, PyObject* value) {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if ((type != tensor_types_[0] && type != tensor_types_[1]) || num_tensors_ == kMaxTensors) {
        return false;
    }
    Tensor& tensor = tensors_[num_tensors_];
    tensor.argument = &argument;
    tensor.object = value;
    if (!reader_.read(value, tensor.view)) {
        return false;
    }
    ++num_tensors_;
    const TensorView& view = tensor.view;
    const auto rank = static_cast<std::size_t>(view.rank);
    append(static_cast<char>('0' + rank), &view.dtype, sizeof(view.dtype));
    bytes_.append(reinterpret_cast<const char*>(&view.device), sizeof(view.device));
    bytes_.append(reinterpret_cast<const char*>(view.sizes.data()), rank * sizeof(std::int64_t));
    bytes_.append(reinterpret_cast<const char*>(view.strides.data()), rank * sizeof(std::int64_t));
    return true;
}

void CallKey::append(char tag, const void* bytes, std::size_t count) {
    bytes_ += tag;
    bytes_.append(static_cast<const char*>(bytes), count);
}

}  // namespace flash8
