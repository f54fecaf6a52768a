// Torch tensors as launches see them, without torch: through DLPack's table, or through their attributes.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "plan_cache/dlpack.h"

namespace flash8 {

struct TensorView {
    static constexpr int kMaxRank = 5;

    std::uintptr_t address = 0;
    std::uint64_t dtype = 0;  // tells dtypes apart, and nothing more
    std::int64_t element_bytes = 0;
    dlpack::Device device{};
    int rank = 0;
    std::array<std::int64_t, kMaxRank> sizes;  // as many as `rank`
    std::array<std::int64_t, kMaxRank> strides;

    // Behind the last byte. The view has elements, and torch's strides are never negative.
    std::uintptr_t end_address() const;
};

// Every function needs the GIL, and takes objects whose type is exactly torch.Tensor or torch.nn.Parameter.
class TensorReader {
  public:
    // `exchange_api` is torch's capsule; anything else stands for a torch that has none.
    explicit TensorReader(const pybind11::object& exchange_api);

    // Whether `tensor` is a strided tensor with memory on a CPU or CUDA device, with at least one element and
    // as it lies in memory: its negation is not pending, which is not asked of one that torch has just made.
    // No Python exception is left set.
    bool read(PyObject* tensor, TensorView& view, bool is_new = false) const;

    bool requires_grad(PyObject* tensor) const;

    // Whether `stream` knows the current streams of a device.
    bool has_streams() const { return api_ != nullptr; }
    std::uint64_t stream(const dlpack::Device& device) const;

  private:
    bool is_integer(const TensorView& view) const;
    bool borrow(PyObject* tensor, TensorView& view) const;
    bool read_attributes(PyObject* tensor, TensorView& view) const;

    const dlpack::ExchangeApi* api_ = nullptr;
};

}  // namespace flash8
