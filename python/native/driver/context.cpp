#include "driver/context.h"

namespace flash8 {

ContextScope::ContextScope(const Driver& driver, int device) : driver_(driver) {
    const cu::Context wanted = driver.primary(device).context;
    cu::Context current = nullptr;
    driver.call(&cu::Entries::ctx_get_current, &current);
    if (current != wanted) {
        driver.call(&cu::Entries::ctx_push_current, wanted);
        pushed_ = true;
    }
}

ContextScope::~ContextScope() {
    if (pushed_) {
        cu::Context popped = nullptr;
        driver_.entries().ctx_pop_current.function(&popped);
    }
}

RelaxedCapture::RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_.call(&cu::Entries::thread_exchange_capture_mode, &mode_);
}

RelaxedCapture::~RelaxedCapture() {
    driver_.entries().thread_exchange_capture_mode.function(&mode_);
}

}  // namespace flash8
