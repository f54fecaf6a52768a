// Letting go of the GIL, and taking it back, in threads that may outlive the interpreter.

#pragma once

#include <pybind11/pybind11.h>

namespace flash8 {

// Python before 3.14 ends a thread that asks for the GIL while the interpreter shuts down, by unwinding its
// stack. A daemon thread that comes back from a launch, or that runs Python code for one, would unwind
// through destructors, which ends the process with an abort. These hold such a thread still instead, as
// Python 3.14 does by itself: it ends with the process.

// Without the GIL for the length of a scope, as pybind11::gil_scoped_release.
class GilRelease {
  public:
    GilRelease();
    ~GilRelease();
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

  private:
    PyThreadState* state_;
    PyThreadState* outer_;
};

// With the GIL for the length of a scope, within a GilRelease of this thread. PyGILState_Ensure would look
// for the thread's state in an interpreter that may be gone, and crash.
class GilAcquire {
  public:
    GilAcquire();
    ~GilAcquire() { PyEval_SaveThread(); }
    GilAcquire(const GilAcquire&) = delete;
    GilAcquire& operator=(const GilAcquire&) = delete;
};

// callable(first, second). The GIL has to be held. Throws pybind11::error_already_set.
pybind11::object call_python(const pybind11::object& callable, const pybind11::object& first,
                             const pybind11::object& second);

using ReleaseGil = pybind11::call_guard<GilRelease>;

}  // namespace flash8
