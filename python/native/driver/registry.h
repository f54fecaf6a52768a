// The kernels of a process, by key: loaded when first asked for, once, whatever the number of threads.

#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "driver/library.h"

namespace flash8 {

class Registry {
  public:
    enum class Image { kCubin, kPtx };

    // Gives an image of a key: from the package, the disk cache, or the compiler. It may throw; the next
    // thread that asks for the key then asks it again. PTX is asked for only when the driver says that the
    // cubin is not for its device.
    using Resolver = std::function<std::string(const std::string& key, Image image)>;

    Registry(std::shared_ptr<const Driver> driver, Resolver resolver);

    // Threads that ask for one key wait for the first of them; other keys are not held up.
    // A thread that asks for a key while it loads that key itself (a finalizer may) loads it on its own.
    std::shared_ptr<Kernel> get(const std::string& key);

  private:
    struct Slot {
        std::recursive_mutex mutex;
        std::shared_ptr<Kernel> kernel;
    };

    std::shared_ptr<Slot> slot(const std::string& key);
    std::shared_ptr<const Library> load(const std::string& key) const;

    std::shared_ptr<const Driver> driver_;
    Resolver resolver_;
    std::mutex mutex_;
    std::unordered_map<std::string, std::shared_ptr<Slot>> slots_;
};

}  // namespace flash8
