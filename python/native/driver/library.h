// Loaded cubins and the kernels in them.

#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "driver/driver.h"
#include "kernel_info.h"

namespace flash8 {

// A cubin, or PTX, in the driver's hands, for every device. Unloaded with the last reference.
class Library {
  public:
    // Throws std::invalid_argument for a cubin that is cut off or damaged, DriverError when the driver
    // refuses.
    Library(std::shared_ptr<const Driver> driver, const std::string& image);
    ~Library();
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    const Driver& driver() const { return *driver_; }
    cu::Kernel kernel(const std::string& name) const;

    // The KernelInfo that the image exports, read from the image itself. Throws std::runtime_error when there
    // is none, or when it has another ABI version.
    KernelInfo info() const;

  private:
    std::shared_ptr<const Driver> driver_;
    std::string info_;  // the bytes of kernel_info
    cu::Library handle_ = nullptr;
};

// One kernel of a library, with what the driver was told of it on each device.
class Kernel {
  public:
    // The kernel that the library's KernelInfo names.
    explicit Kernel(std::shared_ptr<const Library> library);
    // Any other kernel, by its name: the caller knows its launch shape and parameters.
    Kernel(std::shared_ptr<const Library> library, const std::string& name);

    const Driver& driver() const { return library_->driver(); }
    const std::string& name() const { return name_; }
    const std::optional<KernelInfo>& info() const { return info_; }

    struct Needs {
        int shared_bytes = 0;  // dynamic
        int cluster_ctas = 1;
    };

    // The function in the device's context, which must be current. Raises the limits of the function to the
    // needs: once per device, unless the needs grow.
    cu::Function function(int device, const Needs& needs);

    int attribute(int device, cu::FunctionAttribute attribute);

    // Whether a launch on this stream becomes part of a graph instead of running.
    bool is_captured(int device, std::uint64_t stream) const;

  private:
    struct OnDevice {
        cu::Function function = nullptr;
        int max_shared_bytes = 0;
        bool wide_cluster = false;
    };

    OnDevice& on_device(int device);

    std::shared_ptr<const Library> library_;
    std::string name_;
    std::optional<KernelInfo> info_;
    cu::Kernel handle_ = nullptr;
    std::mutex mutex_;
    std::vector<OnDevice> devices_;  // by ordinal
};

}  // namespace flash8
