// Checks whose message is only put together when they fail.

#pragma once

#include <sstream>
#include <stdexcept>

namespace flash8 {

// require(n >= 1, "n is ", n, "; it must be positive"): throws std::invalid_argument, ValueError in Python.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) {
        std::ostringstream message;
        (message << ... << parts);
        throw std::invalid_argument(message.str());
    }
}

}  // namespace flash8
