#include "driver/library.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "driver/context.h"
#include "driver/kernel_image.h"

namespace flash8 {

namespace {

// The cluster size that needs no non-portable request.
constexpr int kPortableClusterCtas = 8;

KernelInfo checked(const std::string& bytes) {
    KernelInfo info{};
    std::memcpy(&info, bytes.data(), std::min(bytes.size(), sizeof(info)));
    if (bytes.empty()) {
        throw std::runtime_error("the image exports no kernel_info");
    }
    if (info.abi_version != kAbiVersion || info.info_bytes != sizeof(KernelInfo) ||
        bytes.size() != sizeof(KernelInfo)) {
        throw std::runtime_error("kernel_info has ABI version " + std::to_string(info.abi_version) + " and " +
                                 std::to_string(bytes.size()) + " bytes; this flash8 reads version " +
                                 std::to_string(kAbiVersion) + " with " + std::to_string(sizeof(KernelInfo)) +
                                 " bytes: compile the kernel again");
    }
    if (std::memchr(info.entry, '\0', sizeof(info.entry)) == nullptr || info.entry[0] == '\0') {
        throw std::runtime_error("kernel_info names no entry");
    }
    const bool counts = info.kBlockM >= 1 && info.threads >= 1 && info.cluster[0] >= 1 &&
                        info.cluster[1] >= 1 && info.cluster[2] >= 1;
    if (!counts) {
        throw std::runtime_error("kernel_info has a kBlockM, threads or cluster below 1");
    }
    return info;
}

}  // namespace

Library::Library(std::shared_ptr<const Driver> driver, const std::string& image)
    : driver_(std::move(driver)), info_(kernel_info_bytes(image)) {
    const RelaxedCapture relaxed(*driver_);
    driver_->call(&cu::Entries::library_load_data, &handle_, image.data(), nullptr, nullptr, 0u, nullptr,
                  nullptr, 0u);
}

Library::~Library() {
    // Errors are ignored: the driver may be gone at the end of the process.
    driver_->entries().library_unload.function(handle_);
}

cu::Kernel Library::kernel(const std::string& name) const {
    cu::Kernel kernel = nullptr;
    const RelaxedCapture relaxed(*driver_);
    driver_->call(&cu::Entries::library_get_kernel, &kernel, handle_, name.c_str());
    return kernel;
}

KernelInfo Library::info() const {
    return checked(info_);
}

Kernel::Kernel(std::shared_ptr<const Library> library)
    : library_(std::move(library)), info_(library_->info()) {
    name_ = info_->entry;
    handle_ = library_->kernel(name_);
}

Kernel::Kernel(std::shared_ptr<const Library> library, const std::string& name)
    : library_(std::move(library)), name_(name), handle_(library_->kernel(name)) {}

Kernel::OnDevice& Kernel::on_device(int device) {
    const auto index = static_cast<std::size_t>(device);
    if (devices_.size() <= index) {
        devices_.resize(index + 1);
    }
    OnDevice& state = devices_[index];
    if (state.function == nullptr) {
        const RelaxedCapture relaxed(driver());
        driver().call(&cu::Entries::kernel_get_function, &state.function, handle_);
    }
    return state;
}

cu::Function Kernel::function(int device, const Needs& needs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    OnDevice& state = on_device(device);
    // Always set: without it the limit is 48 KB less the static shared memory, whose size is unknown here.
    if (needs.shared_bytes > state.max_shared_bytes) {
        const RelaxedCapture relaxed(driver());
        driver().call(&cu::Entries::func_set_attribute, state.function, cu::kMaxDynamicSharedSizeBytes,
                      needs.shared_bytes);
        state.max_shared_bytes = needs.shared_bytes;
    }
    if (needs.cluster_ctas > kPortableClusterCtas && !state.wide_cluster) {
        const RelaxedCapture relaxed(driver());
        driver().call(&cu::Entries::func_set_attribute, state.function, cu::kNonPortableClusterSizeAllowed,
                      1);
        state.wide_cluster = true;
    }
    return state.function;
}

bool Kernel::is_captured(int device, std::uint64_t stream) const {
    const ContextScope scope(driver(), device);
    int status = cu::kCaptureNone;
    driver().call(&cu::Entries::stream_is_capturing, reinterpret_cast<cu::Stream>(stream), &status);
    return status != cu::kCaptureNone;
}

int Kernel::attribute(int device, cu::FunctionAttribute attribute) {
    const ContextScope scope(driver(), device);
    const cu::Function loaded = function(device, {});
    int value = 0;
    driver().call(&cu::Entries::func_get_attribute, &value, attribute, loaded);
    return value;
}

}  // namespace flash8
