// cuGetProcAddress: the entries above by their plain names.
#include <dlfcn.h>

#include <string>

#include "driver_types.h"

namespace {

void* find(const std::string& symbol) {
    Dl_info self;
    static void* library = dladdr(reinterpret_cast<void*>(&find), &self) != 0
                               ? dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD)
                               : nullptr;
    for (const char* suffix : {"_v2", ""}) {
        void* entry = library == nullptr ? nullptr : dlsym(library, (symbol + suffix).c_str());
        if (entry != nullptr) {
            return entry;
        }
    }
    return nullptr;
}

}  // namespace

SIM_EXPORT int cuGetProcAddress_v2(const char* symbol, void** entry, int, uint64_t, int* status) {
    *entry = find(symbol);
    if (status != nullptr) {
        *status = *entry != nullptr ? 0 : 1;
    }
    if (*entry == nullptr) {
        sim::driver::set_last_error(std::string("[unsupported] the simulator has no driver entry ") + symbol);
        return sim::driver::kNotFound;
    }
    return sim::driver::kSuccess;
}
SIM_EXPORT int cuGetProcAddress(const char* symbol, void** entry, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, entry, version, flags, nullptr);
}
