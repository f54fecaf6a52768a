// Devices, contexts, streams and events. There is one device and everything happens at once.
#include <atomic>
#include <cstring>
#include <utility>

#include "config.h"
#include "driver_launch.h"
#include "driver_types.h"
#include "machine.h"

namespace {

using namespace sim::driver;

std::atomic<bool> initialized{false};
char primary_context;
thread_local int context_depth = 0;

int device_attribute(int attribute, int* value) {
    switch (attribute) {
        case 1:
            *value = 1024;
            return kSuccess;  // threads per block
        case 2:
        case 3:
            *value = 1024;
            return kSuccess;  // block x, y
        case 4:
            *value = 64;
            return kSuccess;
        case 5:
            *value = 0x7fffffff;
            return kSuccess;  // grid x
        case 6:
        case 7:
            *value = 65535;
            return kSuccess;
        case 8:
            *value = 48 * 1024;
            return kSuccess;  // shared memory per block
        case 9:
            *value = 64 * 1024;
            return kSuccess;  // constant memory
        case 10:
            *value = 32;
            return kSuccess;  // warp size
        case 12:
        case 82:
            *value = 65536;
            return kSuccess;  // registers per block, per SM
        case 13:
            *value = 1'000'000;
            return kSuccess;  // clock rate: none is meant
        case 16:
            *value = static_cast<int>(sim::global_config().multiprocessors);
            return kSuccess;
        case 38:
            *value = 50 * 1024 * 1024;
            return kSuccess;  // L2
        case 39:
            *value = 2048;
            return kSuccess;  // threads per SM
        case 41:
            *value = 1;
            return kSuccess;  // unified addressing
        case 75:
            *value = 9;
            return kSuccess;  // compute capability
        case 76:
            *value = 0;
            return kSuccess;
        case 81:
            *value = 228 * 1024;
            return kSuccess;  // shared memory per SM
        case 95:
        case 120:
            *value = 1;
            return kSuccess;  // cooperative, cluster launch
        case 97:
            *value = static_cast<int>(sim::kMaxSharedBytes);
            return kSuccess;  // shared memory, opt-in
        case 106:
            *value = 32;
            return kSuccess;  // blocks per SM
        case 111:
            *value = 1024;
            return kSuccess;  // reserved shared memory
        default:
            set_last_error(
                sim::format("[unsupported] cuDeviceGetAttribute: attribute %d is not modelled", attribute));
            return kInvalidValue;
    }
}

int ready(int device) {
    if (!initialized) {
        return kNotInitialized;
    }
    return device == 0 ? kSuccess : kInvalidDevice;
}

}  // namespace

SIM_EXPORT int cuInit(unsigned flags) {
    return guarded([&] {
        sim::global_config();  // reads the environment: a bad value is reported here
        initialized = true;
        return flags == 0 ? kSuccess : kInvalidValue;
    });
}
SIM_EXPORT int cuDriverGetVersion(int* version) {
    *version = 13000;
    return kSuccess;
}
SIM_EXPORT int cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? kSuccess : kNotInitialized;
}
SIM_EXPORT int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ready(ordinal);
}
SIM_EXPORT int cuDeviceGetName(char* name, int bytes, int device) {
    std::strncpy(name, "flash8 simulated sm_90a", static_cast<size_t>(bytes));
    name[bytes - 1] = '\0';
    return ready(device);
}
SIM_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const int result = ready(device);
    return result != kSuccess ? result : device_attribute(attribute, value);
}
SIM_EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = size_t{8} << 30;
    return ready(device);
}
SIM_EXPORT int cuDeviceGetUuid_v2(void* uuid, int device) {
    std::memset(uuid, 0x8f, 16);
    return ready(device);
}

SIM_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &primary_context;
    return ready(device);
}
SIM_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    run_held_launches();
    return ready(device);
}
SIM_EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return ready(device);
}
SIM_EXPORT int cuCtxCreate_v2(void** context, unsigned, int device) {
    *context = &primary_context;
    ++context_depth;
    return ready(device);
}
SIM_EXPORT int cuCtxDestroy_v2(void*) {
    run_held_launches();
    return kSuccess;
}
SIM_EXPORT int cuCtxGetCurrent(void** context) {
    *context = context_depth > 0 ? &primary_context : nullptr;
    return initialized ? kSuccess : kNotInitialized;
}
SIM_EXPORT int cuCtxSetCurrent(void* context) {
    context_depth = context == nullptr ? 0 : 1;
    return kSuccess;
}
SIM_EXPORT int cuCtxPushCurrent_v2(void* context) {
    if (context != &primary_context) {
        return kInvalidContext;
    }
    ++context_depth;
    return kSuccess;
}
SIM_EXPORT int cuCtxPopCurrent_v2(void** context) {
    if (context_depth == 0) {
        return kInvalidContext;
    }
    --context_depth;
    if (context != nullptr) {
        *context = &primary_context;
    }
    return kSuccess;
}
SIM_EXPORT int cuCtxGetDevice(int* device) {
    *device = 0;
    return context_depth > 0 ? kSuccess : kInvalidContext;
}
SIM_EXPORT int cuCtxSynchronize() {
    return wait_for_launches();
}

// Work is done when its call returns, or held back (driver_launch.h), so streams and events only need to be
// told apart.
SIM_EXPORT int cuStreamCreate(void** stream, unsigned) {
    *stream = new char;
    return kSuccess;
}
SIM_EXPORT int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}
SIM_EXPORT int cuStreamDestroy_v2(void* stream) {
    run_held_launches();
    delete static_cast<char*>(stream);
    return kSuccess;
}
SIM_EXPORT int cuStreamSynchronize(void*) {
    return wait_for_launches();
}
SIM_EXPORT int cuStreamQuery(void*) {
    return wait_for_launches();
}
SIM_EXPORT int cuStreamWaitEvent(void*, void*, unsigned) {
    return wait_for_launches();
}
SIM_EXPORT int cuStreamGetCtx(void*, void** context) {
    *context = &primary_context;
    return kSuccess;
}
SIM_EXPORT int cuStreamIsCapturing(void*, int* status) {
    *status = 0;
    return kSuccess;
}
// Nothing captures here, so a mode is only kept: 0 is global, 2 relaxed.
SIM_EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
    thread_local int current = 0;
    std::swap(*mode, current);
    return kSuccess;
}
SIM_EXPORT int cuEventCreate(void** event, unsigned) {
    *event = new char;
    return kSuccess;
}
SIM_EXPORT int cuEventDestroy_v2(void* event) {
    delete static_cast<char*>(event);
    return kSuccess;
}
SIM_EXPORT int cuEventRecord(void*, void*) {
    return wait_for_launches();
}
SIM_EXPORT int cuEventSynchronize(void*) {
    return wait_for_launches();
}
SIM_EXPORT int cuEventQuery(void*) {
    return wait_for_launches();
}
SIM_EXPORT int cuEventElapsedTime(float*, void*, void*) {
    set_last_error("[unsupported] cuEventElapsedTime: the simulator measures no time");
    return kNotSupported;
}
