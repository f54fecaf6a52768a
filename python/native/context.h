// The primary context of a device, current for the length of a scope.

#pragma once

#include "driver.h"

namespace flash8 {

// Threads of torch have the right context current already: then construction is one driver call and
// destruction none. A thread that has another one, or none, gets it pushed and popped.
class ContextScope {
  public:
    ContextScope(const Driver& driver, int device);
    ~ContextScope();
    ContextScope(const ContextScope&) = delete;
    ContextScope& operator=(const ContextScope&) = delete;

  private:
    const Driver& driver_;
    bool pushed_ = false;
};

}  // namespace flash8
