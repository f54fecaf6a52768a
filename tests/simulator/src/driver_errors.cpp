// Names of results, and the simulator's own words for the last one.
#include "driver_types.h"

namespace sim::driver {
namespace {

struct Named {
    int result;
    const char* name;
    const char* text;
};
const Named kNamed[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {kInvalidPtx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {kFileNotFound, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {kIllegalInstruction, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {kMisalignedAddress, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {kInvalidClusterSize, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "cluster misconfiguration"}};

thread_local std::string last;

int lookup(int result, const char** text, bool name) {
    for (const Named& named : kNamed) {
        if (named.result == result) {
            *text = name ? named.name : named.text;
            return kSuccess;
        }
    }
    *text = nullptr;
    return kInvalidValue;
}

}  // namespace

void set_last_error(const std::string& message) {
    last = message;
}
const std::string& last_error() {
    return last;
}

Result result_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kParse:
            return kInvalidPtx;
        case ErrorKind::kUnsupported:
            return kNotSupported;
        case ErrorKind::kInvalidValue:
            return kInvalidValue;
        case ErrorKind::kOutOfBounds:
            return kIllegalAddress;
        case ErrorKind::kMisaligned:
            return kMisalignedAddress;
        case ErrorKind::kDeadlock:
            return kLaunchTimeout;
        case ErrorKind::kClusterSize:
            return kInvalidClusterSize;
        case ErrorKind::kResources:
            return kLaunchOutOfResources;
        default:
            return kLaunchFailed;
    }
}

}  // namespace sim::driver

SIM_EXPORT int cuGetErrorName(int result, const char** name) {
    return sim::driver::lookup(result, name, true);
}
SIM_EXPORT int cuGetErrorString(int result, const char** text) {
    return sim::driver::lookup(result, text, false);
}
SIM_EXPORT const char* flash8_sim_last_error() {
    return sim::driver::last_error().c_str();
}
