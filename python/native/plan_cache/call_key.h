// What a Python call is known by: its arguments, but for the addresses of its tensors.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "plan_cache/tensor_reader.h"

namespace flash8 {

// Collects the arguments of one call into bytes that are equal for calls that are alike: the dtype, device,
// sizes and strides of every tensor, and the type and value of everything else, since True == 1 == 1.0 and
// not all of them are good values for an option. Needs the GIL; what it was given has to outlive it.
class CallKey {
  public:
    static constexpr std::size_t kMaxTensors = 24;

    struct Tensor {
        std::size_t argument;  // its position among the arguments
        PyObject* object;
        TensorView view;
    };

    CallKey(const TensorReader& reader, const std::array<PyObject*, 2>& tensor_types);

    // Adds one more argument: None, a bool, int, float or tensor of exactly that type, or a tuple of all but
    // tensors. False: the argument is none such, and the call is known by nothing.
    bool add(PyObject* argument);

    // The same for an argument that may be no tensor.
    bool add_plain(PyObject* argument);

    // Adds an object that is told apart by its identity and is no argument.
    void add_identity(const void* object) { append('@', &object, sizeof(object)); }

    const std::string& bytes() const { return bytes_; }
    const Tensor* begin() const { return tensors_.data(); }
    const Tensor* end() const { return tensors_.data() + num_tensors_; }
    std::size_t size() const { return num_tensors_; }

  private:
    bool add_value(PyObject* value);  // of anything but a tensor
    bool add_integer(PyObject* value);
    bool add_tensor(PyObject* value);
    void append(char tag, const void* bytes, std::size_t count);

    const TensorReader& reader_;
    const std::array<PyObject*, 2> tensor_types_;
    std::string bytes_;
    std::size_t arguments_ = 0;
    std::size_t num_tensors_ = 0;
    std::array<Tensor, kMaxTensors> tensors_;
};

}  // namespace flash8
