// What the plan caches of calls by name have in common: the call, its tensors as a launch takes them, and
// what belongs to its stream.

#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <tuple>

#include "driver/library.h"
#include "plan_cache/call_key.h"
#include "plan_cache/torch_tensors.h"

namespace flash8 {

// An attention call as the caller made it.
struct CallArguments {
    pybind11::handle scope;    // whose kernels serve it; told apart by identity
    pybind11::dict arguments;  // by name
    bool has_all_names = false;
};

// The same of a call by keywords, before any dict is made of them. It has all names, so that the key need not
// tell None from a name that is missing.
struct CallKeywords {
    pybind11::handle scope;
    PyObject* names;          // a tuple
    PyObject* const* values;  // as many as there are names
};

// False: the call has no key.
bool read_call(CallKey& key, ArgumentNames& names, const CallArguments& call);
bool read_call(CallKey& key, ArgumentNames& names, const CallKeywords& call);

// Whether a byte between the first and the last of one is also that of the other: so do tensors meet whose
// storages do not know of each other, as DLPack and NumPy make them.
bool spans_meet(const TensorView& a, const TensorView& b);

// Whether the tensors that launches access in units of 16 bytes begin at such a unit.
bool is_aligned(const CallKey& key);

// Whether the kernel reads a copy in fp32, which is made for each launch.
bool is_converted(const CallKey::Tensor& tensor);

// Whether there is no `out`, or it lies before or after each other tensor of the call. One that is interlaced
// with them is for the checks of a miss.
bool can_write_out(const CallKey& key);

// Whether autograd has to know of the call. False where the checks of a miss have to say what is wrong: with
// a gradient for a tensor that has none, or for a call that writes.
bool needs_graph(const CallKey& key, const TensorReader& reader, bool grad_enabled, bool& needed);

template <class Params>
void put_address(Params& params, std::size_t place, std::uintptr_t address) {
    std::memcpy(reinterpret_cast<char*>(&params) + place, &address, sizeof(address));
}

template <class Params>
std::uintptr_t address_at(const Params& params, std::size_t place) {
    std::uintptr_t address = 0;
    std::memcpy(&address, reinterpret_cast<const char*>(&params) + place, sizeof(address));
    return address;
}

// Whether a launch points to the call's tensors themselves, but for those that are converted.
template <class Params>
bool points_to_arguments(const CallKey& key, const Params& params) {
    for (const CallKey::Tensor& tensor : key) {
        if (tensor.argument->place != TensorArgument::kElsewhere && !is_converted(tensor) &&
            address_at(params, tensor.argument->place) != tensor.view.address) {
            return false;
        }
    }
    return true;
}

// Whether a launch points to a tensor that the call does not have: lengths made of an int, say.
template <class Params, std::size_t kCount>
bool points_elsewhere(const CallKey& key, const Params& params, const TensorArgument (&tensors)[kCount]) {
    return std::any_of(std::begin(tensors), std::end(tensors), [&](const TensorArgument& argument) {
        const bool given = std::any_of(key.begin(), key.end(), [&](const CallKey::Tensor& tensor) {
            return tensor.argument == &argument;
        });
        return !given && argument.place != TensorArgument::kElsewhere &&
               !argument.has(TensorArgument::kWritten) && address_at(params, argument.place) != 0;
    });
}

// Gives what the parameters point to besides the arguments, to be held until the launch.
template <class Params>
pybind11::object put_arguments(const CallKey& key, const TorchTensors& torch, bool graph, Params& params) {
    pybind11::object converted;
    for (const CallKey::Tensor& tensor : key) {
        if (tensor.argument->place == TensorArgument::kElsewhere) {
            continue;
        }
        std::uintptr_t address = tensor.view.address;
        if (is_converted(tensor)) {
            converted = pybind11::reinterpret_borrow<pybind11::object>(tensor.object);
            converted = (graph ? converted.attr("detach")() : converted).attr("float")();
            address = torch.address_of(converted);
        }
        put_address(params, tensor.argument->place, address);
    }
    return converted;
}

// The call's `out`, or a new tensor.
pybind11::object make_out(const CallKey& key, const TorchTensors& torch, const pybind11::object& out_like);

// Memory that launches of one stream share, since they never run at the same time.
struct StreamMemory {
    pybind11::object held;
    std::uintptr_t counters = 0;
    std::uintptr_t scratch = 0;
    std::size_t scratch_bytes = 0;
};

// The counters and scratch memory of launches: one that runs uses its stream's, which never change, and one
// that is captured gets its own.
class StreamMemories {
  public:
    // get: (device, stream, captured) -> counters, or (device, stream, captured, bytes) -> (counters, scratch
    // memory) for launches that have such.
    explicit StreamMemories(pybind11::object get) : get_(std::move(get)) {}

    // A stream's scratch memory is replaced where a launch takes more bytes of it than all before.
    StreamMemory of(const CallKey::Tensor& q, const TorchTensors& torch, const Kernel& kernel, int device,
                    std::uint64_t stream, std::size_t bytes = 0);

  private:
    using Key = std::tuple<int, int, std::uint64_t, unsigned long>;  // device, stream, thread

    StreamMemory ask(const CallKey::Tensor& q, const TorchTensors& torch, std::uint64_t stream, bool captured,
                     std::size_t bytes) const;

    pybind11::object get_;
    std::map<Key, StreamMemory> kept_;
};

}  // namespace flash8
