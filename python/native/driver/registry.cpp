#include "driver/registry.h"

#include <utility>

namespace flash8 {

Registry::Registry(std::shared_ptr<const Driver> driver, Resolver resolver)
    : driver_(std::move(driver)), resolver_(std::move(resolver)) {}

std::shared_ptr<Kernel> Registry::get(const std::string& key) {
    const std::shared_ptr<Slot> found = slot(key);
    const std::lock_guard<std::recursive_mutex> lock(found->mutex);
    if (found->kernel == nullptr) {
        auto loaded = std::make_shared<Kernel>(load(key));
        if (found->kernel == nullptr) {
            found->kernel = std::move(loaded);
        }
    }
    return found->kernel;
}

std::shared_ptr<const Library> Registry::load(const std::string& key) const {
    try {
        return std::make_shared<const Library>(driver_, resolver_(key, Image::kCubin));
    } catch (const DriverError& error) {
        if (error.code() != cu::kNoBinaryForGpu) {
            throw;
        }
    }
    return std::make_shared<const Library>(driver_, resolver_(key, Image::kPtx));
}

std::shared_ptr<Registry::Slot> Registry::slot(const std::string& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Slot>& slot = slots_[key];
    if (slot == nullptr) {
        slot = std::make_shared<Slot>();
    }
    return slot;
}

}  // namespace flash8
