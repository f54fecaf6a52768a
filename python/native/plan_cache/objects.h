// What Python's C functions give, as objects.

#pragma once

#include <pybind11/pybind11.h>

namespace flash8 {

// Takes over a new reference. Throws the exception that is set where there is none.
inline pybind11::object steal(PyObject* object) {
    if (object == nullptr) {
        throw pybind11::error_already_set();
    }
    return pybind11::reinterpret_steal<pybind11::object>(object);
}

}  // namespace flash8
