// libcudart_sim.so: the part of the CUDA runtime that nvcc's host code and CUTLASS's launchers call, over
// the simulated driver. With it a program that nvcc compiled (`-cudart none`, PTX embedded uncompressed)
// launches its kernels with <<<>>> or cudaLaunchKernelExC on the simulated device. Tests only.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define RUNTIME_EXPORT extern "C" __attribute__((visibility("default")))

// The driver entries that it uses; libcuda_sim.so has them.
extern "C" {
int cuInit(unsigned flags);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxPushCurrent_v2(void* context);
int cuDeviceGetAttribute(int* value, int attribute, int device);
int cuModuleLoadData(void** module, const void* image);
int cuModuleGetFunction(void** function, void* module, const char* name);
int cuFuncSetAttribute(void* function, int attribute, int value);
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void* stream);
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra);
int cuGetProcAddress_v2(const char* symbol, void** entry, int version, uint64_t flags, int* status);
const char* flash8_sim_last_error();
}

namespace {

struct Dim3 {
    unsigned x, y, z;
};

// What nvcc puts around the device code of a translation unit.
struct FatbinWrapper {
    uint32_t magic, version;
    const char* data;
    void* unused;
};
struct FatbinHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
};
struct FatbinEntry {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;
};
constexpr uint32_t kWrapperMagic = 0x466243b1, kFatbinMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;

[[noreturn]] void give_up(const char* what) {
    std::fprintf(stderr, "libcudart_sim: %s: %s\n", what, flash8_sim_last_error());
    std::abort();
}

struct Module {
    std::string ptx;
    void* handle = nullptr;
};

struct Kernel {
    Module* module = nullptr;
    std::string name;
    void* function = nullptr;
};

struct PushedLaunch {
    Dim3 grid, block;
    size_t shared_bytes;
    void* stream;
};

struct State {
    std::mutex mutex;
    std::vector<std::unique_ptr<Module>> modules;
    std::map<const void*, Kernel> kernels;  // by the address of the host's stub
};

State& state() {
    static State the_state;
    return the_state;
}

thread_local std::vector<PushedLaunch> pushed;
thread_local int last_error = 0;

// Callers turn errors into numbers of their own, so the text is said here.
int remember(int result) {
    if (result != 0) {
        std::fprintf(stderr, "libcudart_sim: error %d: %s\n", result, flash8_sim_last_error());
        last_error = result;
    }
    return result;
}

void use_device() {
    static const bool once = [] {
        void* context = nullptr;
        if (cuInit(0) != 0 || cuDevicePrimaryCtxRetain(&context, 0) != 0 ||
            cuCtxPushCurrent_v2(context) != 0) {
            give_up("no context");
        }
        return true;
    }();
    static_cast<void>(once);
}

std::string ptx_of(const FatbinWrapper& wrapper) {
    FatbinHeader header;
    std::memcpy(&header, wrapper.data, sizeof header);
    if (wrapper.magic != kWrapperMagic || header.magic != kFatbinMagic) {
        give_up("an unknown layout of embedded device code");
    }
    const char* at = wrapper.data + header.header_bytes;
    const char* end = at + header.bytes;
    while (at < end) {
        FatbinEntry entry;
        std::memcpy(&entry, at, sizeof entry);
        const char* body = at + entry.header_bytes;
        if (entry.kind == kPtx) {
            return std::string(body, strnlen(body, entry.bytes));
        }
        at = body + entry.bytes;
    }
    give_up("no PTX is embedded");
}

// Loaded when first used: programs register kernels that they never launch.
void* function_of(const void* stub) {
    use_device();
    const std::lock_guard<std::mutex> lock(state().mutex);
    const auto found = state().kernels.find(stub);
    if (found == state().kernels.end()) {
        give_up("a kernel that nobody registered");
    }
    Kernel& kernel = found->second;
    if (kernel.module->handle == nullptr &&
        cuModuleLoadData(&kernel.module->handle, kernel.module->ptx.c_str()) != 0) {
        give_up("the embedded PTX does not load");
    }
    if (kernel.function == nullptr &&
        cuModuleGetFunction(&kernel.function, kernel.module->handle, kernel.name.c_str()) != 0) {
        give_up(kernel.name.c_str());
    }
    return kernel.function;
}

struct LaunchConfig {  // CUlaunchConfig
    Dim3 grid, block;
    unsigned shared_bytes;
    void* stream;
    const void* attributes;
    unsigned attribute_count;
};

struct RuntimeLaunchConfig {  // cudaLaunchConfig_t; its attributes have the driver's layout and numbers
    Dim3 grid, block;
    size_t shared_bytes;
    void* stream;
    const void* attributes;
    unsigned attribute_count;
};

}  // namespace

// --- registration, by the constructors that nvcc generates ---

RUNTIME_EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().modules.push_back(std::make_unique<Module>());
    state().modules.back()->ptx = ptx_of(*static_cast<const FatbinWrapper*>(wrapper));
    return reinterpret_cast<void**>(state().modules.back().get());
}
RUNTIME_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
RUNTIME_EXPORT void __cudaUnregisterFatBinary(void**) {}
RUNTIME_EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
RUNTIME_EXPORT void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int,
                                           void*, void*, void*, void*, int*) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    Kernel& kernel = state().kernels[stub];
    kernel.module = reinterpret_cast<Module*>(module);
    kernel.name = name;
}

// --- launches ---

RUNTIME_EXPORT int cudaLaunchKernelExC(const RuntimeLaunchConfig* config, const void* stub,
                                       void** parameters) {
    const LaunchConfig launch{config->grid,   config->block,      static_cast<unsigned>(config->shared_bytes),
                              config->stream, config->attributes, config->attribute_count};
    return remember(cuLaunchKernelEx(&launch, function_of(stub), parameters, nullptr));
}
RUNTIME_EXPORT int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** parameters,
                                    size_t shared_bytes, void* stream) {
    const RuntimeLaunchConfig config{grid, block, shared_bytes, stream, nullptr, 0};
    return cudaLaunchKernelExC(&config, stub, parameters);
}
RUNTIME_EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes,
                                                    void* stream) {
    pushed.push_back({grid, block, shared_bytes, stream});
    return 0;
}
RUNTIME_EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
    if (pushed.empty()) {
        return remember(1);
    }
    const PushedLaunch launch = pushed.back();
    pushed.pop_back();
    *grid = launch.grid;
    *block = launch.block;
    *shared_bytes = launch.shared_bytes;
    *static_cast<void**>(stream) = launch.stream;
    return 0;
}
RUNTIME_EXPORT int __cudaGetKernel(const void** kernel, const void* stub) {
    *kernel = stub;
    return 0;
}
RUNTIME_EXPORT int __cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** parameters,
                                      size_t shared_bytes, void* stream) {
    return cudaLaunchKernel(stub, grid, block, parameters, shared_bytes, stream);
}

RUNTIME_EXPORT int cudaMemsetAsync(void* address, int value, size_t count, void* stream) {
    use_device();
    return remember(cuMemsetD8Async(reinterpret_cast<uint64_t>(address), static_cast<unsigned char>(value),
                                    count, stream));
}

// --- attributes, devices, errors ---

RUNTIME_EXPORT int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
    return remember(cuFuncSetAttribute(function_of(stub), attribute, value));
}
RUNTIME_EXPORT int cudaGetDevice(int* device) {
    *device = 0;
    return 0;
}
RUNTIME_EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    use_device();
    return remember(cuDeviceGetAttribute(value, attribute, device));
}
RUNTIME_EXPORT int cudaGetLastError() {
    const int error = last_error;
    last_error = 0;
    return error;
}
RUNTIME_EXPORT int cudaPeekAtLastError() {
    return last_error;
}
RUNTIME_EXPORT const char* cudaGetErrorString(int) {
    return flash8_sim_last_error();
}
RUNTIME_EXPORT int cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned version,
                                                    unsigned long long flags, int* status) {
    use_device();
    return remember(cuGetProcAddress_v2(symbol, entry, static_cast<int>(version), flags, status));
}
