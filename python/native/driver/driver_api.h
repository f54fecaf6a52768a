// The part of the CUDA driver's ABI that flash8 uses, declared here so that the build needs no CUDA header.
// Types and values are those of the public driver API; a driver (or a stand-in for one) that exports every
// symbol of FLASH8_DRIVER_ENTRIES can run flash8. tests/native/test_driver_api.py compares all of it with
// cuda.h where that header is installed.

#pragma once

#include <cstddef>
#include <cstdint>

namespace flash8::cu {

using Result = int;
using Device = int;
using DevicePtr = std::uint64_t;
using Context = struct ContextOpaque*;
using Library = struct LibraryOpaque*;
using Kernel = struct KernelOpaque*;
using Function = struct FunctionOpaque*;
using Stream = struct StreamOpaque*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kNoBinaryForGpu = 209;

enum DeviceAttribute : int {
    kMultiprocessorCount = 16,
    kComputeCapabilityMajor = 75,
    kComputeCapabilityMinor = 76,
    kMaxSharedMemoryPerBlockOptin = 97,
};

inline constexpr int kCaptureNone = 0;  // a stream runs what it is given

// Of the CUstreamCaptureMode: a thread in this mode may load and allocate while a stream captures.
inline constexpr int kCaptureModeRelaxed = 2;

// The handle of the per-thread default stream, which is a different stream in every thread.
inline constexpr std::uint64_t kStreamPerThread = 2;

enum FunctionAttribute : int {
    kLocalSizeBytes = 3,
    kNumRegs = 4,
    kMaxDynamicSharedSizeBytes = 8,
    kNonPortableClusterSizeAllowed = 14,
};

enum LaunchAttributeId : int {
    kLaunchClusterDimension = 4,
    kLaunchProgrammaticStreamSerialization = 6,
};

struct LaunchAttribute {
    LaunchAttributeId id;
    char pad[4];
    union Value {
        char bytes[64];
        struct {
            unsigned x, y, z;
        } cluster;
        int flag;
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8);

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);

// X(member, exported symbol, parameters). Every entry returns Result.
#define FLASH8_DRIVER_ENTRIES(X)                                                                     \
    X(init, cuInit, (unsigned flags))                                                                \
    X(driver_get_version, cuDriverGetVersion, (int* version))                                        \
    X(get_error_name, cuGetErrorName, (Result, const char** name))                                   \
    X(get_error_string, cuGetErrorString, (Result, const char** text))                               \
    X(device_get_count, cuDeviceGetCount, (int* count))                                              \
    X(device_get, cuDeviceGet, (Device*, int ordinal))                                               \
    X(device_get_name, cuDeviceGetName, (char* name, int bytes, Device))                             \
    X(device_get_attribute, cuDeviceGetAttribute, (int* value, DeviceAttribute, Device))             \
    X(primary_ctx_retain, cuDevicePrimaryCtxRetain, (Context*, Device))                              \
    X(ctx_get_current, cuCtxGetCurrent, (Context*))                                                  \
    X(ctx_push_current, cuCtxPushCurrent_v2, (Context))                                              \
    X(ctx_pop_current, cuCtxPopCurrent_v2, (Context*))                                               \
    X(ctx_synchronize, cuCtxSynchronize, ())                                                         \
    X(library_load_data, cuLibraryLoadData,                                                          \
      (Library*, const void* image, int* jit_options, void** jit_values, unsigned num_jit_options,   \
       int* library_options, void** library_values, unsigned num_library_options))                   \
    X(library_unload, cuLibraryUnload, (Library))                                                    \
    X(library_get_kernel, cuLibraryGetKernel, (Kernel*, Library, const char* name))                  \
    X(kernel_get_function, cuKernelGetFunction, (Function*, Kernel))                                 \
    X(func_get_attribute, cuFuncGetAttribute, (int* value, FunctionAttribute, Function))             \
    X(func_set_attribute, cuFuncSetAttribute, (Function, FunctionAttribute, int value))              \
    X(launch_kernel_ex, cuLaunchKernelEx,                                                            \
      (const LaunchConfig*, Function, void** kernel_params, void** extra))                           \
    X(tensor_map_encode_tiled, cuTensorMapEncodeTiled,                                               \
      (void* map, int element_type, std::uint32_t rank, void* address, const std::uint64_t* dims,    \
       const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* element_strides, \
       int interleave, int swizzle, int l2_promotion, int out_of_bounds_fill))                       \
    X(mem_alloc, cuMemAlloc_v2, (DevicePtr*, std::size_t bytes))                                     \
    X(mem_free, cuMemFree_v2, (DevicePtr))                                                           \
    X(memcpy_htod, cuMemcpyHtoD_v2, (DevicePtr, const void* from, std::size_t bytes))                \
    X(memcpy_dtoh, cuMemcpyDtoH_v2, (void* to, DevicePtr, std::size_t bytes))                        \
    X(stream_create, cuStreamCreate, (Stream*, unsigned flags))                                      \
    X(stream_destroy, cuStreamDestroy_v2, (Stream))                                                  \
    X(stream_synchronize, cuStreamSynchronize, (Stream))                                             \
    X(stream_is_capturing, cuStreamIsCapturing, (Stream, int* status))                               \
    X(thread_exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))

template <class Signature>
struct Entry {
    const char* symbol;
    Signature* function;
};

struct Entries {
#define FLASH8_DRIVER_ENTRY(member, symbol, parameters) Entry<Result parameters> member{#symbol, nullptr};
    FLASH8_DRIVER_ENTRIES(FLASH8_DRIVER_ENTRY)
#undef FLASH8_DRIVER_ENTRY
};

}  // namespace flash8::cu
