// What a driver documents that it refuses: tensor maps, and calls while a stream captures.

#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "driver_api.h"

namespace fake {

namespace cu = flash8::cu;

inline thread_local int capture_mode = 0;  // global

// What a thread may call while a stream captures: what asks, and what becomes a node; in the relaxed mode
// also what loads and allocates beside the graph. Everything else waits for the device, or may, and would
// spoil the graph.
inline bool is_legal_in_capture(const std::string& entry) {
    static const auto& legal =
        *new std::set<std::string>{"cuDeviceGet",          "cuDeviceGetCount",
                                   "cuDeviceGetAttribute", "cuCtxGetCurrent",
                                   "cuCtxPushCurrent_v2",  "cuCtxPopCurrent_v2",
                                   "cuStreamIsCapturing",  "cuTensorMapEncodeTiled",
                                   "cuLaunchKernelEx",     "cuInit",
                                   "cuDriverGetVersion",   "cuThreadExchangeStreamCaptureMode"};
    static const auto& relaxed = *new std::set<std::string>{
        "cuLibraryLoadData",  "cuLibraryGetKernel",       "cuKernelGetFunction", "cuFuncSetAttribute",
        "cuFuncGetAttribute", "cuDevicePrimaryCtxRetain", "cuMemAlloc_v2"};
    return legal.count(entry) != 0 || (capture_mode == cu::kCaptureModeRelaxed && relaxed.count(entry) != 0);
}

inline bool is_multiple(std::uint64_t value, std::uint64_t unit) {
    return value % unit == 0;
}

inline std::uint64_t bytes_of(int element_type) {
    static const std::map<int, std::uint64_t> bytes{{0, 1}, {1, 2}, {2, 4}, {3, 4}, {4, 8},
                                                    {5, 8}, {6, 2}, {7, 4}, {8, 8}, {9, 2}};
    const auto found = bytes.find(element_type);
    return found == bytes.end() ? 0 : found->second;
}

// What cuda.h says of the tensor of cuTensorMapEncodeTiled without interleaving. The strides that it
// describes begin with the size of a row, and none is smaller.
inline bool can_encode(int element_type, std::uint32_t rank, const void* address, const std::uint64_t* dims,
                       const std::uint64_t* strides) {
    if (bytes_of(element_type) == 0 || rank < 1 || rank > 5 || address == nullptr ||
        !is_multiple(reinterpret_cast<std::uintptr_t>(address), 16)) {
        return false;
    }
    const auto fits = [](std::uint64_t dim) { return dim >= 1 && dim <= std::uint64_t{1} << 32; };
    const auto steps = [&](std::uint64_t stride) {
        return is_multiple(stride, 16) && stride < std::uint64_t{1} << 40 &&
               stride >= dims[0] * bytes_of(element_type);
    };
    return std::all_of(dims, dims + rank, fits) && std::all_of(strides, strides + rank - 1, steps);
}

// The same of the box and the swizzle.
inline bool can_move(int element_type, std::uint32_t rank, const std::uint32_t* box,
                     const std::uint32_t* element_strides, int swizzle) {
    const auto in_range = [](std::uint32_t most) {
        return [most](std::uint32_t value) { return value >= 1 && value <= most; };
    };
    const std::uint64_t inner = box[0] * bytes_of(element_type);
    const std::uint64_t most_inner[] = {~std::uint64_t{0}, 32, 64, 128};
    return swizzle >= 0 && swizzle <= 3 && inner <= most_inner[swizzle] && is_multiple(inner, 16) &&
           std::all_of(box, box + rank, in_range(256)) &&
           std::all_of(element_strides, element_strides + rank, in_range(8));
}

}  // namespace fake
