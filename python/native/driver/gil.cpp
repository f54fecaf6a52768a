#include "driver/gil.h"

#include <unistd.h>

#include <utility>

namespace flash8 {

namespace {

// Of the innermost GilRelease.
thread_local PyThreadState* released = nullptr;

class HoldsStillWhenUnwound {
  public:
    HoldsStillWhenUnwound() = default;
    ~HoldsStillWhenUnwound() {
        while (!returned_) {
            pause();
        }
    }
    HoldsStillWhenUnwound(const HoldsStillWhenUnwound&) = delete;
    HoldsStillWhenUnwound& operator=(const HoldsStillWhenUnwound&) = delete;

    void returned() { returned_ = true; }

  private:
    volatile bool returned_ = false;
};

// Functions of their own: within one that may not throw, such as a destructor, the compiler may leave out
// what is to be done when the stack unwinds.
[[gnu::noinline]] void restore(PyThreadState* state) {
    HoldsStillWhenUnwound thread;
    PyEval_RestoreThread(state);
    thread.returned();
}

[[gnu::noinline]] PyObject* call(PyObject* callable, PyObject* first, PyObject* second) {
    HoldsStillWhenUnwound thread;
    PyObject* const result = PyObject_CallFunctionObjArgs(callable, first, second, nullptr);
    thread.returned();
    return result;
}

}  // namespace

GilRelease::GilRelease() : state_(PyEval_SaveThread()), outer_(std::exchange(released, state_)) {}

GilRelease::~GilRelease() {
    restore(state_);
    released = outer_;
}

GilAcquire::GilAcquire() {
    restore(released);
}

pybind11::object call_python(const pybind11::object& callable, const pybind11::object& first,
                             const pybind11::object& second) {
    PyObject* const result = call(callable.ptr(), first.ptr(), second.ptr());
    if (result == nullptr) {
        throw pybind11::error_already_set();
    }
    return pybind11::reinterpret_steal<pybind11::object>(result);
}

}  // namespace flash8
