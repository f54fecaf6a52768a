// The part of DLPack's C exchange API (dmlc/dlpack, 1.x) that a launch needs: a tensor borrowed for as long
// as its Python object is held, and the stream that its framework works on. torch offers the table as
// torch.Tensor.__dlpack_c_exchange_api__, so this needs none of its headers or libraries.

#pragma once

#include <cstddef>
#include <cstdint>

namespace flash8::dlpack {

inline constexpr const char* kCapsuleName = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

inline constexpr std::uint64_t kInt = 0;
inline constexpr std::uint64_t kUInt = 1;

inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kCuda = 2;

struct Device {
    std::int32_t type;
    std::int32_t id;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements
    std::uint64_t byte_offset;
};

struct ExchangeApi {
    std::uint32_t major;
    std::uint32_t minor;
    ExchangeApi* older;
    void (*allocate)();  // these three: managed tensors, which nothing here uses
    void (*to_managed)();
    void (*from_managed)();
    // Both give 0, or -1 with a Python exception set. `borrow` may be null.
    int (*borrow)(void* object, Tensor* tensor);
    int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24);
static_assert(offsetof(ExchangeApi, allocate) == 16 && offsetof(ExchangeApi, borrow) == 40);

}  // namespace flash8::dlpack
