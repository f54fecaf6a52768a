// Memory of the device, which is memory of the host.
#include <cstdlib>
#include <cstring>

#include "driver_launch.h"
#include "driver_types.h"
#include "grid_chain.h"
#include "memory_map.h"

namespace {

using namespace sim::driver;
using sim::MemoryMap;

int known(uint64_t address, size_t bytes, const char* entry) {
    sim::MemoryRange range;
    if (bytes == 0) {
        return kSuccess;
    }
    if (!MemoryMap::instance().find(address, &range) || address + bytes > range.end) {
        set_last_error(std::string("[out-of-bounds] ") + entry + ": " +
                       sim::describe_address(*MemoryMap::instance().snapshot(), address));
        return kInvalidValue;
    }
    return kSuccess;
}

int copy(uint64_t to, uint64_t from, size_t bytes, bool to_device, bool from_device, const char* entry) {
    int result = wait_for_launches();
    if (result == kSuccess && to_device) {
        result = known(to, bytes, entry);
    }
    if (result == kSuccess && from_device) {
        result = known(from, bytes, entry);
    }
    if (result == kSuccess) {
        std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        MemoryMap::instance().copy_written(to, from, bytes);
    }
    return result;
}

template <class T>
int fill(uint64_t to, T value, size_t count, const char* entry) {
    int result = wait_for_launches();
    if (result == kSuccess) {
        result = known(to, count * sizeof(T), entry);
    }
    for (size_t i = 0; result == kSuccess && i < count; ++i) {
        std::memcpy(reinterpret_cast<uint8_t*>(to) + i * sizeof(T), &value, sizeof(T));
    }
    if (result == kSuccess) {
        MemoryMap::instance().set_written(to, count * sizeof(T), true);
    }
    return result;
}

uint64_t address_of(const void* pointer) {
    return reinterpret_cast<uint64_t>(pointer);
}

}  // namespace

SIM_EXPORT int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
    if (bytes == 0) {
        return kInvalidValue;
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 512, (bytes + 511) / 512 * 512) != 0) {
        return kOutOfMemory;
    }
    std::memset(memory, 0xff, bytes);  // NaN: nothing may count on fresh memory
    *pointer = address_of(memory);
    MemoryMap::instance().add(*pointer, bytes, "allocation", true);
    MemoryMap::instance().set_written(*pointer, bytes, false);
    return kSuccess;
}
SIM_EXPORT int cuMemAllocAsync(uint64_t* pointer, size_t bytes, void*) {
    return cuMemAlloc_v2(pointer, bytes);
}
SIM_EXPORT int cuMemFree_v2(uint64_t pointer) {
    sim::MemoryRange range;
    if (pointer == 0) {
        return kSuccess;
    }
    if (!MemoryMap::instance().find(pointer, &range) || range.begin != pointer || !range.owned) {
        set_last_error("[invalid-value] cuMemFree: this is no allocation of cuMemAlloc");
        return kInvalidValue;
    }
    run_held_launches();
    MemoryMap::instance().remove(pointer);
    sim::end_chain();
    std::free(reinterpret_cast<void*>(pointer));
    return kSuccess;
}
SIM_EXPORT int cuMemFreeAsync(uint64_t pointer, void*) {
    return cuMemFree_v2(pointer);
}
SIM_EXPORT int cuMemAllocHost_v2(void** pointer, size_t bytes) {
    uint64_t address = 0;
    const int result = cuMemAlloc_v2(&address, bytes);
    if (result == kSuccess) {
        MemoryMap::instance().set_written(address, bytes, true);  // the host's stores are not seen
    }
    *pointer = reinterpret_cast<void*>(address);
    return result;
}
SIM_EXPORT int cuMemFreeHost(void* pointer) {
    return cuMemFree_v2(address_of(pointer));
}
SIM_EXPORT int cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
    MemoryMap::instance().add(address_of(pointer), bytes, "registered host memory");
    return kSuccess;
}
SIM_EXPORT int cuMemHostUnregister(void* pointer) {
    run_held_launches();
    return MemoryMap::instance().remove(address_of(pointer)) ? kSuccess : kInvalidValue;
}
SIM_EXPORT int cuMemHostGetDevicePointer_v2(uint64_t* device, void* pointer, unsigned) {
    *device = address_of(pointer);
    return kSuccess;
}
SIM_EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    *total = size_t{8} << 30;
    *free_bytes = *total - MemoryMap::instance().owned_bytes();
    return kSuccess;
}
SIM_EXPORT int cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t pointer) {
    sim::MemoryRange range;
    if (!MemoryMap::instance().find(pointer, &range)) {
        return kNotFound;
    }
    if (base != nullptr) {
        *base = range.begin;
    }
    if (bytes != nullptr) {
        *bytes = range.end - range.begin;
    }
    return kSuccess;
}

SIM_EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    return copy(to, address_of(from), bytes, true, false, "cuMemcpyHtoD");
}
SIM_EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    return copy(address_of(to), from, bytes, false, true, "cuMemcpyDtoH");
}
SIM_EXPORT int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    return copy(to, from, bytes, true, true, "cuMemcpyDtoD");
}
SIM_EXPORT int cuMemcpy(uint64_t to, uint64_t from, size_t bytes) {
    return copy(to, from, bytes, false, false, "cuMemcpy");
}
SIM_EXPORT int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void*) {
    return cuMemcpy(to, from, bytes);
}
SIM_EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    return cuMemcpyHtoD_v2(to, from, bytes);
}
SIM_EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    return cuMemcpyDtoH_v2(to, from, bytes);
}
SIM_EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    return cuMemcpyDtoD_v2(to, from, bytes);
}
SIM_EXPORT int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t count) {
    return fill(to, value, count, "cuMemsetD8");
}
SIM_EXPORT int cuMemsetD16_v2(uint64_t to, unsigned short value, size_t count) {
    return fill(to, value, count, "cuMemsetD16");
}
SIM_EXPORT int cuMemsetD32_v2(uint64_t to, unsigned value, size_t count) {
    return fill(to, value, count, "cuMemsetD32");
}
SIM_EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void*) {
    return cuMemsetD8_v2(to, value, count);
}
SIM_EXPORT int cuMemsetD16Async(uint64_t to, unsigned short value, size_t count, void*) {
    return cuMemsetD16_v2(to, value, count);
}
SIM_EXPORT int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void*) {
    return cuMemsetD32_v2(to, value, count);
}

SIM_EXPORT int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
    sim::MemoryRange range;
    if (!MemoryMap::instance().find(pointer, &range)) {
        return kInvalidValue;
    }
    switch (attribute) {
        case 2:
            *static_cast<unsigned*>(value) = 2;
            return kSuccess;  // memory type: device
        case 3:
            *static_cast<uint64_t*>(value) = pointer;
            return kSuccess;  // device pointer
        case 4:
            *static_cast<void**>(value) = reinterpret_cast<void*>(pointer);
            return kSuccess;
        case 8:
            *static_cast<unsigned*>(value) = 0;
            return kSuccess;  // managed
        case 9:
            *static_cast<int*>(value) = 0;
            return kSuccess;  // device ordinal
        case 11:
            *static_cast<uint64_t*>(value) = range.begin;
            return kSuccess;
        case 12:
            *static_cast<size_t*>(value) = range.end - range.begin;
            return kSuccess;
        default:
            set_last_error(
                sim::format("[unsupported] cuPointerGetAttribute: attribute %d is not modelled", attribute));
            return kInvalidValue;
    }
}
SIM_EXPORT int cuPointerGetAttributes(unsigned count, int* attributes, void** values, uint64_t pointer) {
    for (unsigned i = 0; i < count; ++i) {
        const int result = cuPointerGetAttribute(values[i], attributes[i], pointer);
        if (result != kSuccess) {
            return result;
        }
    }
    return kSuccess;
}

// Memory a kernel may use in place: the bytes of a CPU tensor.
SIM_EXPORT int flash8_sim_register_memory(const void* pointer, size_t bytes) {
    if (bytes == 0) {
        return kSuccess;
    }
    MemoryMap::instance().add(address_of(pointer), bytes, "registered memory");
    return kSuccess;
}
// From now on these bytes count as memory that nobody has written, whatever they hold.
SIM_EXPORT int flash8_sim_forget_memory(const void* pointer, size_t bytes) {
    run_held_launches();
    const int result = known(address_of(pointer), bytes, "flash8_sim_forget_memory");
    if (result == kSuccess && bytes != 0) {
        MemoryMap::instance().set_written(address_of(pointer), bytes, false);
    }
    return result;
}
SIM_EXPORT int flash8_sim_unregister_memory(const void* pointer) {
    run_held_launches();
    return MemoryMap::instance().remove(address_of(pointer)) ? kSuccess : kInvalidValue;
}
