// The primary context of a device, current for the length of a scope.

#pragma once

#include "driver/driver.h"

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

// While it lives, this thread may load kernels and set their limits even while a stream captures: neither
// becomes part of the graph. Copies and waits stay illegal.
class RelaxedCapture {
  public:
    explicit RelaxedCapture(const Driver& driver);
    ~RelaxedCapture();
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    const Driver& driver_;
    int mode_ = cu::kCaptureModeRelaxed;  // after construction: the previous mode
};

}  // namespace flash8
