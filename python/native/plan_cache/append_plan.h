// What a call over a KV cache launches before its attention: new rows into the caches, and Q rotated. Or the
// same within the kernel of its attention, which launches nothing more.

#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan_cache/launch_arguments.h"
#include "quantize/append_params.h"

namespace flash8 {

class AppendPlan {
  public:
    struct Launch {
        std::shared_ptr<Kernel> kernel;  // null: the append is within the decode kernel
        AppendParams params;
    };

    // Tensors of a call that its launches write, and attention reads.
    struct Made {
        pybind11::object lengths;  // of the sequences from now on; none within the decode kernel
        pybind11::object rotated;  // Q; None where it is not rotated
        std::uintptr_t lengths_address = 0;
        std::uintptr_t rotated_address = 0;
    };

    // lengths_like, rotated_like: one element each, expanded to the shape, where the launches make such.
    AppendPlan(std::vector<Launch> launches, pybind11::object lengths_like, pybind11::object rotated_like)
        : launches_(std::move(launches)),
          lengths_like_(std::move(lengths_like)),
          rotated_like_(std::move(rotated_like)) {}

    // Learns from the call that the launches are of which argument each address in them is. False: one is of
    // none, but of a copy, and there is no plan.
    bool learn(const CallKey& key);

    // Whether the tensors of a call lie so that its new rows may be written: what is read shares no memory
    // with the caches, and these share none, or lie to each other as those did that were learned from.
    bool may_write(const CallKey& key) const;

    // New tensors for a call, in the launches of which they and its arguments are put.
    Made make(const CallKey& key, const TorchTensors& torch, std::vector<Launch>& launches) const;

    // The launches make what attention reads in the place of arguments.
    bool is_ahead() const { return !lengths_like_.is_none(); }
    bool rotates() const { return !rotated_like_.is_none(); }
    // As the launches have them that were learned from.
    std::uintptr_t lengths_address() const;
    std::uintptr_t rotated_address() const;

  private:
    struct Place {
        std::size_t launch;
        std::size_t offset;
        std::size_t tensor;  // of the key
    };

    std::vector<Launch> launches_;
    pybind11::object lengths_like_;
    pybind11::object rotated_like_;
    std::vector<Place> places_;
    std::uintptr_t between_caches_ = 0;
};

}  // namespace flash8
