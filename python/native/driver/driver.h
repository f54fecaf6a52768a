// The CUDA driver as a table of entry points in a shared library that is opened at run time.

#pragma once

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver/driver_api.h"

namespace flash8 {

// The driver refused a call. name is the driver's own, such as "CUDA_ERROR_OUT_OF_MEMORY".
class DriverError : public std::runtime_error {
  public:
    DriverError(std::string entry, cu::Result code, std::string name, const std::string& text);

    const std::string& entry() const { return entry_; }
    cu::Result code() const { return code_; }
    const std::string& name() const { return name_; }

  private:
    std::string entry_;
    cu::Result code_;
    std::string name_;
};

// There is no driver to call: the library cannot be opened, or it lacks an entry point.
class DriverNotFound : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct DeviceInfo {
    int ordinal;
    std::string name;
    int major;
    int minor;
    int multiprocessors;
    int max_shared_bytes;  // dynamic shared memory that a CTA may ask for
};

// What a machine offers, without an exception: when not available, reason says why.
struct DriverProbe {
    bool available = false;
    std::string reason;
    std::string path;
    int version = 0;  // 13000 is CUDA 13.0
    std::vector<DeviceInfo> devices;
};

// One opened driver, shared freely by threads: only the primary devices are filled in later, under a lock.
// The library stays open until the process ends: its own threads may outlive every Driver.
class Driver {
  public:
    // Opens the library and finds every entry. Throws DriverNotFound.
    static std::shared_ptr<const Driver> load(const std::string& path);

    // The driver of this process: the library that the environment variable FLASH8_DRIVER names when this
    // is first called, libcuda.so.1 otherwise. Initialised. Throws DriverNotFound or DriverError.
    static std::shared_ptr<const Driver> process();

    static DriverProbe probe();

    // driver.call(&cu::Entries::init, 0): throws DriverError when the driver refuses.
    template <class Signature, class... Arguments>
    void call(cu::Entry<Signature> cu::Entries::* member, Arguments... arguments) const {
        const cu::Entry<Signature>& entry = entries_.*member;
        if (const cu::Result result = entry.function(arguments...); result != cu::kSuccess) {
            raise(entry.symbol, result);
        }
    }

    int version() const;
    std::vector<DeviceInfo> devices() const;
    int attribute(cu::DeviceAttribute attribute, cu::Device device) const;
    const std::string& path() const { return path_; }
    const cu::Entries& entries() const { return entries_; }

    // A device as launches need it, looked up once. Its primary context is retained until the process ends,
    // as the CUDA runtime retains it.
    struct Primary {
        cu::Context context = nullptr;
        int multiprocessors = 0;
    };
    Primary primary(int device) const;

  private:
    Driver() = default;
    [[noreturn]] void raise(const char* entry, cu::Result result) const;

    std::string path_;
    cu::Entries entries_;
    mutable std::mutex mutex_;
    mutable std::vector<Primary> primaries_;  // by device ordinal; a null context is not yet retained
};

}  // namespace flash8
