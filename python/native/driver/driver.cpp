#include "driver/driver.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "driver/context.h"

namespace flash8 {

namespace {

std::string process_path() {
    const char* named = std::getenv("FLASH8_DRIVER");
    return named != nullptr && *named != '\0' ? named : "libcuda.so.1";
}

std::string describe(const std::string& entry, const std::string& name, const std::string& text) {
    return entry + ": " + name + (text.empty() ? "" : " (" + text + ")");
}

}  // namespace

DriverError::DriverError(std::string entry, cu::Result code, std::string name, const std::string& text)
    : std::runtime_error(describe(entry, name, text)),
      entry_(std::move(entry)),
      code_(code),
      name_(std::move(name)) {}

std::shared_ptr<const Driver> Driver::load(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw DriverNotFound(dlerror());
    }
    std::shared_ptr<Driver> driver(new Driver());
    driver->path_ = path;
    const auto resolve = [&](auto& entry) {
        void* address = dlsym(library, entry.symbol);
        if (address == nullptr) {
            throw DriverNotFound(path + " has no " + entry.symbol +
                                 "; flash8 needs the driver of CUDA 12.0 or newer");
        }
        entry.function = reinterpret_cast<decltype(entry.function)>(address);
    };
#define FLASH8_RESOLVE_ENTRY(member, symbol, parameters) resolve(driver->entries_.member);
    FLASH8_DRIVER_ENTRIES(FLASH8_RESOLVE_ENTRY)
#undef FLASH8_RESOLVE_ENTRY
    driver->call(&cu::Entries::init, 0u);
    return driver;
}

std::shared_ptr<const Driver> Driver::process() {
    // A failed load leaves the table empty, and the next call tries again.
    static std::mutex mutex;
    // Never destroyed: threads may outlive what is.
    static auto& driver = *new std::shared_ptr<const Driver>();
    const std::lock_guard<std::mutex> lock(mutex);
    if (driver == nullptr) {
        driver = load(process_path());
    }
    return driver;
}

DriverProbe Driver::probe() {
    DriverProbe result;
    result.path = process_path();
    try {
        const std::shared_ptr<const Driver> driver = process();
        result.path = driver->path();
        result.version = driver->version();
        result.devices = driver->devices();
        result.available = !result.devices.empty();
        result.reason = result.available ? "" : "the driver reports no device";
    } catch (const std::runtime_error& error) {
        result.reason = error.what();
    }
    return result;
}

int Driver::version() const {
    int version = 0;
    call(&cu::Entries::driver_get_version, &version);
    return version;
}

int Driver::attribute(cu::DeviceAttribute attribute, cu::Device device) const {
    int value = 0;
    call(&cu::Entries::device_get_attribute, &value, attribute, device);
    return value;
}

std::vector<DeviceInfo> Driver::devices() const {
    int count = 0;
    call(&cu::Entries::device_get_count, &count);
    std::vector<DeviceInfo> devices;
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        cu::Device device = 0;
        std::array<char, 256> name{};
        call(&cu::Entries::device_get, &device, ordinal);
        call(&cu::Entries::device_get_name, name.data(), static_cast<int>(name.size()) - 1, device);
        devices.push_back({ordinal, name.data(), attribute(cu::kComputeCapabilityMajor, device),
                           attribute(cu::kComputeCapabilityMinor, device),
                           attribute(cu::kMultiprocessorCount, device),
                           attribute(cu::kMaxSharedMemoryPerBlockOptin, device)});
    }
    return devices;
}

Driver::Primary Driver::primary(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (device < 0 || static_cast<std::size_t>(device) >= primaries_.size()) {
        int count = 0;
        call(&cu::Entries::device_get_count, &count);
        if (device < 0 || device >= count) {
            throw std::invalid_argument("device is " + std::to_string(device) + "; the driver has " +
                                        std::to_string(count) + " device(s), counted from 0");
        }
        primaries_.resize(static_cast<std::size_t>(count));
    }
    Primary& primary = primaries_[static_cast<std::size_t>(device)];
    if (primary.context == nullptr) {
        cu::Device handle = 0;
        call(&cu::Entries::device_get, &handle, device);
        primary.multiprocessors = attribute(cu::kMultiprocessorCount, handle);
        const RelaxedCapture relaxed(*this);
        call(&cu::Entries::primary_ctx_retain, &primary.context, handle);
    }
    return primary;
}

void Driver::raise(const char* entry, cu::Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    if (entries_.get_error_name.function(result, &name) != cu::kSuccess || name == nullptr) {
        throw DriverError(entry, result, "CUDA error " + std::to_string(result), "");
    }
    if (entries_.get_error_string.function(result, &text) != cu::kSuccess || text == nullptr) {
        text = "";
    }
    throw DriverError(entry, result, name, text);
}

}  // namespace flash8
