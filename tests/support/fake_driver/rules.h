// What a driver documents that it refuses while a stream captures.

#pragma once

#include <set>
#include <string>

#include "driver/driver_api.h"

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

}  // namespace fake
