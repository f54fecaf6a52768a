#include "driver/memory.h"

#include <exception>
#include <utility>

#include "driver/context.h"
#include "driver/require.h"

namespace flash8 {

namespace {

constexpr unsigned kStreamNonBlocking = 1;

// For destructors, which ignore errors: at the end of the process the driver may be gone already.
template <class Release>
void release_quietly(const Driver& driver, int device, Release release) noexcept {
    try {
        const ContextScope scope(driver, device);
        release();
    } catch (const std::exception&) {
        return;
    }
}

}  // namespace

DeviceMemory::DeviceMemory(std::shared_ptr<const Driver> driver, std::size_t bytes, int device)
    : driver_(std::move(driver)), device_(device), bytes_(bytes) {
    require(bytes > 0, "bytes is 0; device memory has at least 1 byte");
    const ContextScope scope(*driver_, device_);
    driver_->call(&cu::Entries::mem_alloc, &address_, bytes);
}

DeviceMemory::~DeviceMemory() {
    release_quietly(*driver_, device_, [this] { driver_->entries().mem_free.function(address_); });
}

void DeviceMemory::check_span(std::size_t bytes, std::size_t offset) const {
    require(offset <= bytes_ && bytes <= bytes_ - offset, bytes, " bytes at offset ", offset,
            " do not fit in device memory of ", bytes_, " bytes");
}

void DeviceMemory::write(const void* from, std::size_t bytes, std::size_t offset) {
    check_span(bytes, offset);
    const ContextScope scope(*driver_, device_);
    driver_->call(&cu::Entries::memcpy_htod, address_ + offset, from, bytes);
}

void DeviceMemory::read(void* to, std::size_t bytes, std::size_t offset) const {
    check_span(bytes, offset);
    const ContextScope scope(*driver_, device_);
    driver_->call(&cu::Entries::memcpy_dtoh, to, address_ + offset, bytes);
}

Stream::Stream(std::shared_ptr<const Driver> driver, int device)
    : driver_(std::move(driver)), device_(device) {
    const ContextScope scope(*driver_, device_);
    driver_->call(&cu::Entries::stream_create, &stream_, kStreamNonBlocking);
}

Stream::~Stream() {
    release_quietly(*driver_, device_, [this] { driver_->entries().stream_destroy.function(stream_); });
}

void Stream::synchronize() const {
    const ContextScope scope(*driver_, device_);
    driver_->call(&cu::Entries::stream_synchronize, stream_);
}

void synchronize(const Driver& driver, int device) {
    const ContextScope scope(driver, device);
    driver.call(&cu::Entries::ctx_synchronize);
}

}  // namespace flash8
