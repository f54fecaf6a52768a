// Modules, libraries, kernels and their attributes. Images are PTX text.
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "driver_launch.h"
#include "driver_types.h"
#include "machine.h"
#include "module.h"

namespace {

using namespace sim::driver;
using sim::Kernel;
using sim::Module;

std::mutex table_mutex;
std::unordered_set<void*> live_modules;

Module* as_module(void* handle) {
    const std::lock_guard<std::mutex> lock(table_mutex);
    return live_modules.count(handle) != 0 ? static_cast<Module*>(handle) : nullptr;
}

int load(void** handle, const void* image) {
    const char* text = static_cast<const char*>(image);
    if (text == nullptr) {
        return kInvalidValue;
    }
    if (std::memcmp(text,
                    "\x7f"
                    "ELF",
                    4) == 0 ||
        std::memcmp(text, "\x50\xed\x55\xba", 4) == 0) {
        set_last_error("[unsupported] this image is a cubin or fatbinary: the simulator runs PTX text");
        return kNoBinaryForGpu;
    }
    return guarded([&] {
        auto module = std::make_unique<Module>(text);
        const std::lock_guard<std::mutex> lock(table_mutex);
        *handle = module.release();
        live_modules.insert(*handle);
        return kSuccess;
    });
}

int unload(void* handle) {
    if (as_module(handle) == nullptr) {
        return kInvalidHandle;
    }
    run_held_launches();
    {
        const std::lock_guard<std::mutex> lock(table_mutex);
        live_modules.erase(handle);
    }
    delete static_cast<Module*>(handle);
    return kSuccess;
}

int find_kernel(void** kernel, void* handle, const char* name) {
    Module* module = as_module(handle);
    if (module == nullptr) {
        return kInvalidHandle;
    }
    *kernel = module->find_kernel(name);
    if (*kernel == nullptr) {
        set_last_error(std::string("[invalid-value] the module has no kernel '") + name + "'");
        return kNotFound;
    }
    return kSuccess;
}

int find_global(uint64_t* address, size_t* bytes, void* handle, const char* name) {
    Module* module = as_module(handle);
    if (module == nullptr) {
        return kInvalidHandle;
    }
    const sim::GlobalVariable* global = module->find_global(name);
    if (global == nullptr) {
        set_last_error(std::string("[invalid-value] the module has no variable '") + name + "'");
        return kNotFound;
    }
    if (address != nullptr) {
        *address = global->address;
    }
    if (bytes != nullptr) {
        *bytes = global->bytes;
    }
    return kSuccess;
}

// What ptxas would have given: not known from PTX, so the most the launch bounds allow.
int registers_of(const Kernel& kernel) {
    if (kernel.registers_at_launch != 0) {
        return static_cast<int>(kernel.registers_at_launch);
    }
    const int by_threads = static_cast<int>(65536 / std::max(32u, kernel.max_threads) / 8 * 8);
    return std::min(255, by_threads);
}

int get_attribute(int* value, int attribute, const Kernel& kernel) {
    switch (attribute) {
        case 0:
            *value = static_cast<int>(kernel.max_threads);
            return kSuccess;
        case 1:
            *value = static_cast<int>(kernel.static_shared_bytes);
            return kSuccess;
        case 2:
            *value = 0;
            return kSuccess;
        case 3:
            *value = static_cast<int>(kernel.program.local_bytes);
            return kSuccess;
        case 4:
            *value = registers_of(kernel);
            return kSuccess;
        case 5:
        case 6:
            *value = 90;
            return kSuccess;
        case 8:
            *value = static_cast<int>(kernel.max_dynamic_shared);
            return kSuccess;
        case 10:
            *value = kernel.required_cluster[0] != 0;
            return kSuccess;
        case 11:
        case 12:
        case 13:
            *value = static_cast<int>(kernel.required_cluster[attribute - 11]);
            return kSuccess;
        case 14:
            *value = kernel.non_portable_cluster;
            return kSuccess;
        default:
            set_last_error(
                sim::format("[unsupported] cuFuncGetAttribute: attribute %d is not modelled", attribute));
            return kInvalidValue;
    }
}

int set_attribute(int attribute, int value, Kernel& kernel) {
    switch (attribute) {
        case 8:
            if (value < 0 ||
                static_cast<uint32_t>(value) + kernel.static_shared_bytes > sim::kMaxSharedBytes) {
                set_last_error(
                    sim::format("[resources] %d bytes of dynamic shared memory and %u static exceed 227 KB",
                                value, kernel.static_shared_bytes));
                return kInvalidValue;
            }
            kernel.max_dynamic_shared = static_cast<uint32_t>(value);
            return kSuccess;
        case 9:
            if (value < -1 || value > 100) {
                set_last_error(sim::format("[invalid-value] a preferred carve-out of %d percent", value));
                return kInvalidValue;
            }
            return kSuccess;  // a hint
        case 14:
            kernel.non_portable_cluster = value != 0;
            return kSuccess;
        default:
            set_last_error(
                sim::format("[unsupported] cuFuncSetAttribute: attribute %d is not modelled", attribute));
            return kInvalidValue;
    }
}

}  // namespace

SIM_EXPORT int cuModuleLoadData(void** module, const void* image) {
    return load(module, image);
}
SIM_EXPORT int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options,
                                  void** values) {
    const int result = load(module, image);
    char* log = nullptr;
    size_t bytes = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (options[i] == 5) {  // error log buffer
            log = static_cast<char*>(values[i]);
        } else if (options[i] == 6) {
            bytes = reinterpret_cast<size_t>(values[i]);
        }
    }
    if (log != nullptr && bytes != 0) {
        std::snprintf(log, bytes, "%s", result == kSuccess ? "" : last_error().c_str());
    }
    return result;
}
SIM_EXPORT int cuModuleUnload(void* module) {
    return unload(module);
}
SIM_EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    return find_kernel(function, module, name);
}
SIM_EXPORT int cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
    return find_global(address, bytes, module, name);
}

SIM_EXPORT int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**,
                                 unsigned) {
    return load(library, image);
}
SIM_EXPORT int cuLibraryUnload(void* library) {
    return unload(library);
}
SIM_EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    return find_kernel(kernel, library, name);
}
SIM_EXPORT int cuLibraryGetModule(void** module, void* library) {
    *module = library;
    return as_module(library) != nullptr ? kSuccess : kInvalidHandle;
}
SIM_EXPORT int cuLibraryGetGlobal(uint64_t* address, size_t* bytes, void* library, const char* name) {
    return find_global(address, bytes, library, name);
}
SIM_EXPORT int cuLibraryGetKernelCount(unsigned* count, void* library) {
    Module* module = as_module(library);
    if (module == nullptr) {
        return kInvalidHandle;
    }
    *count = static_cast<unsigned>(module->kernels().size());
    return kSuccess;
}
SIM_EXPORT int cuLibraryEnumerateKernels(void** kernels, unsigned count, void* library) {
    Module* module = as_module(library);
    if (module == nullptr) {
        return kInvalidHandle;
    }
    const auto all = module->kernels();
    for (unsigned i = 0; i < count && i < all.size(); ++i) {
        kernels[i] = all[i];
    }
    return kSuccess;
}
SIM_EXPORT int cuKernelGetFunction(void** function, void* kernel) {
    *function = kernel;
    return kernel != nullptr ? kSuccess : kInvalidHandle;
}
SIM_EXPORT int cuKernelGetName(const char** name, void* kernel) {
    *name = static_cast<Kernel*>(kernel)->name.c_str();
    return kSuccess;
}
SIM_EXPORT int cuKernelGetAttribute(int* value, int attribute, void* kernel, int) {
    return get_attribute(value, attribute, *static_cast<Kernel*>(kernel));
}
SIM_EXPORT int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
    return set_attribute(attribute, value, *static_cast<Kernel*>(kernel));
}
SIM_EXPORT int cuFuncGetAttribute(int* value, int attribute, void* function) {
    return get_attribute(value, attribute, *static_cast<Kernel*>(function));
}
SIM_EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    return set_attribute(attribute, value, *static_cast<Kernel*>(function));
}
SIM_EXPORT int cuFuncSetCacheConfig(void*, int) {
    return kSuccess;
}
SIM_EXPORT int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
    const auto& params = static_cast<Kernel*>(function)->ast.params;
    if (index >= params.size()) {
        return kInvalidValue;
    }
    *offset = params[index].offset;
    if (bytes != nullptr) {
        *bytes = params[index].size;
    }
    return kSuccess;
}
SIM_EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads,
                                                           size_t dynamic) {
    const Kernel& kernel = *static_cast<Kernel*>(function);
    const size_t shared = kernel.static_shared_bytes + dynamic + 1024;
    *blocks = static_cast<int>(std::min<size_t>(2048 / std::max(32, threads), 228 * 1024 / shared));
    return kSuccess;
}
