#include "gil.h"

#include <unistd.h>

namespace flash8 {

namespace {

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

[[gnu::noinline]] PyGILState_STATE ensure() {
    HoldsStillWhenUnwound thread;
    const PyGILState_STATE state = PyGILState_Ensure();
    thread.returned();
    return state;
}

}  // namespace

GilRelease::~GilRelease() {
    restore(state_);
}

GilAcquire::GilAcquire() : state_(ensure()) {}

}  // namespace flash8
