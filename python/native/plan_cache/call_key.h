// The key of a Python call: its arguments by name, but for the addresses of its tensors.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "plan_cache/tensor_reader.h"

namespace flash8 {

// A tensor that calls may have, and what its launch does with it.
struct TensorArgument {
    enum Traits : unsigned {
        kGivesDevice = 1,  // the launch is on its device and stream
        kAligned = 2,      // TMA reads it, or the epilogue writes it, in units of 16 bytes
        kDifferentiable = 4,
        kReadInFloat32 = 8,  // it may come in the type of q
        kWritten = 16,
    };

    static constexpr std::size_t kElsewhere = ~std::size_t{0};

    const char* name;
    std::size_t place;  // of its address in the parameters; kElsewhere: another launch's
    unsigned traits = 0;

    bool has(Traits trait) const { return (traits & trait) != 0; }
};

// The names of arguments as Python objects: those of tensors, and every other that was ever looked up.
class ArgumentNames {
  public:
    static constexpr std::size_t kNone = ~std::size_t{0};

    template <std::size_t kCount>
    explicit ArgumentNames(const TensorArgument (&tensors)[kCount]) {
        for (const TensorArgument& tensor : tensors) {
            names_.push_back({intern(tensor.name), &tensor, names_.size() + 1});
        }
    }

    // The number of a name, or kNone if it is no text or there are too many. It is looked for first where it
    // was found last after the same name, `previous`, which is kNone for the first one.
    std::size_t number(PyObject* name, std::size_t previous);

    // The tensor argument of that number; null if it is no tensor.
    const TensorArgument* tensor(std::size_t number) const { return names_[number].tensor; }

  private:
    struct Name {
        pybind11::object text;  // interned
        const TensorArgument* tensor;
        std::size_t next = 0;  // the name that came last after this one
    };

    static constexpr std::size_t kMostNames = 128;  // a number is one byte of a key

    static pybind11::object intern(const char* name);
    std::size_t find(PyObject* name);

    std::vector<Name> names_;
};

// Collects the arguments of one call into bytes that are equal for calls that are alike: the dtype, device,
// sizes and strides of every tensor, and the type and value of everything else, since True == 1 == 1.0 and
// not all of them are good values for an option. Needs the GIL; what it was given has to outlive it.
class CallKey {
  public:
    static constexpr std::size_t kMaxTensors = 32;

    struct Tensor {
        const TensorArgument* argument;
        PyObject* object;
        TensorView view;
    };

    CallKey(const TensorReader& reader, const std::array<PyObject*, 2>& tensor_types);

    // Adds the argument of this number: None, a bool, int or float of exactly that type, a tuple of such, or
    // a tensor where `tensor` is not null. False: it is none such, and the call has no key.
    bool add(std::size_t number, const TensorArgument* tensor, PyObject* value);

    // Adds an object that is told apart by its identity and is no argument.
    void add_identity(const void* object) { append('@', &object, sizeof(object)); }

    const std::string& bytes() const { return bytes_; }
    const Tensor* begin() const { return tensors_.data(); }
    const Tensor* end() const { return tensors_.data() + num_tensors_; }
    // The first tensor with a trait; null if there is none.
    const Tensor* find(TensorArgument::Traits trait) const;

  private:
    bool add_value(PyObject* value);  // of anything but a tensor
    bool add_integer(PyObject* value);
    bool add_tensor(const TensorArgument& argument, PyObject* value);
    void append(char tag, const void* bytes, std::size_t count);

    const TensorReader& reader_;
    const std::array<PyObject*, 2> tensor_types_;
    std::string bytes_;
    std::size_t num_tensors_ = 0;
    std::array<Tensor, kMaxTensors> tensors_;
};

}  // namespace flash8
