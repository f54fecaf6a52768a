// What the plan caches ask of torch: how tensors lie, new ones, and the stream of the moment.

#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "plan_cache/call_key.h"
#include "plan_cache/tensor_reader.h"

namespace flash8 {

class TorchTensors {
  public:
    // Torch's, and the Hopper backend's, as Python objects.
    struct Functions {
        pybind11::object exchange_api;  // torch.Tensor.__dlpack_c_exchange_api__, or None
        std::array<pybind11::object, 2> tensor_types;
        pybind11::object empty_like;
        pybind11::object current_stream;     // (tensor) -> handle
        pybind11::object increment_version;  // (tensors) -> None
    };

    explicit TorchTensors(Functions functions);

    const TensorReader& reader() const { return reader_; }
    CallKey new_key() const;

    // The quickest way to a new tensor: `like` is one element, expanded to the shape.
    pybind11::object new_like(const pybind11::object& like) const;

    // Says that a launch writes tensors that were there before, for whoever has saved one for a backward.
    void mark_written(const pybind11::tuple& tensors) const { functions_.increment_version(tensors); }
    void mark_written(const CallKey& key) const;  // its `out`, if there is one

    // Of a tensor that torch has made. Throws std::runtime_error if it has no memory.
    std::uintptr_t address_of(const pybind11::object& tensor) const;

    // Of the device that the tensor is on.
    std::uint64_t current_stream(const CallKey::Tensor& tensor) const;

  private:
    Functions functions_;
    TensorReader reader_;
};

}  // namespace flash8
