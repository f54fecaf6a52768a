// The part of the CUDA driver's ABI that the simulator exports: values as in the public driver API.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "errors.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

namespace sim::driver {

enum Result : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidPtx = 218,
    kFileNotFound = 301,
    kInvalidHandle = 400,
    kNotFound = 500,
    kIllegalAddress = 700,
    kLaunchOutOfResources = 701,
    kLaunchTimeout = 702,
    kMisalignedAddress = 716,
    kIllegalInstruction = 715,
    kLaunchFailed = 719,
    kNotSupported = 801,
    kInvalidClusterSize = 912,
};

struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        struct {
            unsigned x, y, z;
        } cluster;
        int flag;
    } value;
};

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

// What flash8_sim_last_error() says; per thread, like the driver's own errors.
void set_last_error(const std::string& message);
const std::string& last_error();
Result result_of(ErrorKind kind);

// Runs a driver entry: an exception becomes its result and the last error.
template <class F>
int guarded(F body) {
    try {
        return body();
    } catch (const SimError& error) {
        std::string text = error.what();
        if (error.line() != 0 && text.find("PTX line") == std::string::npos) {
            text = format("PTX line %d: ", error.line()) + text;
        }
        set_last_error(std::string("[") + name_of(error.kind()) + "] " + text);
        return result_of(error.kind());
    } catch (const std::bad_alloc&) {
        set_last_error("out of host memory");
        return kOutOfMemory;
    }
}

}  // namespace sim::driver
