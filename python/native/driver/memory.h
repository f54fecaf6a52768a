// Device memory and streams for programs that do not have torch's.

#pragma once

#include <cstdint>
#include <memory>

#include "driver/driver.h"

namespace flash8 {

class DeviceMemory {
  public:
    DeviceMemory(std::shared_ptr<const Driver> driver, std::size_t bytes, int device);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    std::uint64_t address() const { return address_; }
    std::size_t bytes() const { return bytes_; }

    // Copies are waited for. All throw std::invalid_argument when the bytes do not fit.
    void write(const void* from, std::size_t bytes, std::size_t offset);
    void read(void* to, std::size_t bytes, std::size_t offset) const;
    void check_span(std::size_t bytes, std::size_t offset) const;

  private:
    std::shared_ptr<const Driver> driver_;
    int device_;
    std::size_t bytes_;
    cu::DevicePtr address_ = 0;
};

// A stream that does not wait for the default stream.
class Stream {
  public:
    Stream(std::shared_ptr<const Driver> driver, int device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    std::uint64_t handle() const { return reinterpret_cast<std::uint64_t>(stream_); }
    void synchronize() const;

  private:
    std::shared_ptr<const Driver> driver_;
    int device_;
    cu::Stream stream_ = nullptr;
};

// Waits for everything that was enqueued on the device.
void synchronize(const Driver& driver, int device);

}  // namespace flash8
