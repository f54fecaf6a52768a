// A CUDA driver that does nothing: it answers the entry points of python/native/driver/driver_api.h, keeps
// memory on the host, counts and records calls, fails on demand, and refuses what the driver documents that
// it refuses: tensor maps, and calls while a stream captures. A "cubin" of it is an ELF file whose header is
// followed by a KernelInfo (cubin.py makes them), with kernels named by its entry and "plain"; PTX has
// "plain" alone. Control is through the fake_* functions.

#include <elf.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "driver/driver_api.h"
#include "kernel_info.h"
#include "rules.h"
#include "tensor_map_rules.h"

namespace cu = flash8::cu;
using fake::capture_mode;

namespace {

constexpr cu::Result kInvalidValue = 1;
constexpr cu::Result kInvalidImage = 200;
constexpr cu::Result kInvalidContext = 201;
constexpr cu::Result kNotFound = 500;
constexpr cu::Result kCaptureUnsupported = 900;

struct State {
    std::mutex mutex;
    std::map<std::string, int> counts;
    std::map<std::string, cu::Result> failures;
    std::map<std::string, int> delays;  // milliseconds
    std::vector<std::string> launches;
    std::vector<std::string> parameters;  // the first one of every launch whose size is known
    std::set<void*> libraries;
    std::size_t allocations = 0;
    bool recording = true;
    int devices = 1;
};

State& state() {
    static State& instance = *new State();  // for threads that outlive main
    return instance;
}

std::atomic<bool> recording{true};
std::atomic<bool> capturing{false};
std::chrono::milliseconds linger{0};
thread_local std::vector<cu::Context> context_stack;

// Counts the call and gives the failure that a test has planted for it.
cu::Result enter(const char* entry) {
    if (capturing && !fake::is_legal_in_capture(entry)) {
        return kCaptureUnsupported;
    }
    if (!recording) {
        return cu::kSuccess;
    }
    std::unique_lock<std::mutex> lock(state().mutex);
    ++state().counts[entry];
    const auto planted = state().failures.find(entry);
    const cu::Result result = planted == state().failures.end() ? cu::kSuccess : planted->second;
    const auto delay = state().delays.find(entry);
    if (delay != state().delays.end()) {
        const std::chrono::milliseconds time(delay->second);
        lock.unlock();
        std::this_thread::sleep_for(time);
    }
    return result;
}

#define ENTER()                                                         \
    do {                                                                \
        if (const cu::Result planted = enter(__func__); planted != 0) { \
            return planted;                                             \
        }                                                               \
    } while (false)

#define ENTER_WITH_CONTEXT()     \
    ENTER();                     \
    if (context_stack.empty()) { \
        return kInvalidContext;  \
    }

cu::Context context_of(int device) {
    return reinterpret_cast<cu::Context>(std::intptr_t{device} + 1);
}

std::intptr_t current_device() {
    return reinterpret_cast<std::intptr_t>(context_stack.back()) - 1;
}

struct LoadedKernel {
    std::string name;
    std::size_t params_bytes = 0;
};

struct LoadedLibrary {
    flash8::KernelInfo info;
    LoadedKernel kernels[2];
};

std::string describe(const cu::LaunchConfig& config, cu::Function function, void** parameters) {
    std::ostringstream text;
    text << reinterpret_cast<LoadedKernel*>(function)->name << " device=" << current_device()
         << " grid=" << config.grid_x << ',' << config.grid_y << ',' << config.grid_z
         << " block=" << config.block_x << ',' << config.block_y << ',' << config.block_z
         << " shared=" << config.shared_bytes
         << " stream=" << reinterpret_cast<std::uintptr_t>(config.stream);
    for (unsigned i = 0; i < config.num_attributes; ++i) {
        const cu::LaunchAttribute& attribute = config.attributes[i];
        if (attribute.id == cu::kLaunchClusterDimension) {
            const auto& cluster = attribute.value.cluster;
            text << " cluster=" << cluster.x << ',' << cluster.y << ',' << cluster.z;
        } else {
            text << " attribute" << attribute.id << '=' << attribute.value.flag;
        }
    }
    if (parameters[0] != nullptr) {
        text << " first=" << static_cast<int>(*static_cast<unsigned char*>(parameters[0]));
    }
    return text.str();
}

}  // namespace

extern "C" {

// ---- control ----

void fake_reset(int devices) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().counts.clear();
    state().failures.clear();
    state().delays.clear();
    state().launches.clear();
    state().parameters.clear();
    state().devices = devices;
    recording = true;
    capturing = false;
}

void fake_capture(int on) {
    capturing = on != 0;
}

void fake_record(int on) {
    recording = on != 0;
}

void fake_fail(const char* entry, int code) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().failures[entry] = code;
}

void fake_delay(const char* entry, int milliseconds) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().delays[entry] = milliseconds;
}

// The process ends that much later: threads that outlive main go on when the interpreter is gone.
void fake_linger(int milliseconds) {
    linger = std::chrono::milliseconds(milliseconds);
}

[[gnu::destructor]] void fake_end() {
    std::this_thread::sleep_for(linger);
}

int fake_count(const char* entry) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    return state().counts[entry];
}

// What is alive: libraries plus allocations.
int fake_alive() {
    const std::lock_guard<std::mutex> lock(state().mutex);
    return static_cast<int>(state().libraries.size() + state().allocations);
}

int fake_context_depth() {
    return static_cast<int>(context_stack.size());
}

int fake_capture_mode() {
    return capture_mode;
}

int fake_launches() {
    const std::lock_guard<std::mutex> lock(state().mutex);
    return static_cast<int>(state().launches.size());
}

const char* fake_launch(int index) {
    thread_local std::string text;
    const std::lock_guard<std::mutex> lock(state().mutex);
    text = state().launches.at(static_cast<std::size_t>(index));
    return text.c_str();
}

// Copies the first parameter of a launch and gives its size.
int fake_parameter(int index, char* target) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    const std::string& bytes = state().parameters.at(static_cast<std::size_t>(index));
    std::memcpy(target, bytes.data(), bytes.size());
    return static_cast<int>(bytes.size());
}

// ---- the driver ----

cu::Result cuInit(unsigned) {
    ENTER();
    return cu::kSuccess;
}

cu::Result cuDriverGetVersion(int* version) {
    ENTER();
    *version = 13000;
    return cu::kSuccess;
}

cu::Result cuGetErrorName(cu::Result code, const char** name) {
    static const std::map<int, const char*> names{{1, "CUDA_ERROR_INVALID_VALUE"},
                                                  {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                  {100, "CUDA_ERROR_NO_DEVICE"},
                                                  {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                  {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                                  {500, "CUDA_ERROR_NOT_FOUND"},
                                                  {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = names.find(code);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : cu::kSuccess;
}

cu::Result cuGetErrorString(cu::Result code, const char** text) {
    *text = code == 2 ? "out of memory" : nullptr;
    return code == 2 ? cu::kSuccess : kInvalidValue;
}

cu::Result cuDeviceGetCount(int* count) {
    ENTER();
    *count = state().devices;
    return cu::kSuccess;
}

cu::Result cuDeviceGet(cu::Device* device, int ordinal) {
    ENTER();
    *device = ordinal;
    return cu::kSuccess;
}

cu::Result cuDeviceGetName(char* name, int bytes, cu::Device device) {
    ENTER();
    std::strncpy(name, ("Fake " + std::to_string(device)).c_str(), static_cast<std::size_t>(bytes));
    return cu::kSuccess;
}

cu::Result cuDeviceGetAttribute(int* value, cu::DeviceAttribute attribute, cu::Device) {
    ENTER();
    static const std::map<int, int> values{{16, 132}, {75, 9}, {76, 0}, {97, 232448}};
    *value = values.at(attribute);
    return cu::kSuccess;
}

cu::Result cuDevicePrimaryCtxRetain(cu::Context* context, cu::Device device) {
    ENTER();
    *context = context_of(device);
    return cu::kSuccess;
}

cu::Result cuCtxGetCurrent(cu::Context* context) {
    ENTER();
    *context = context_stack.empty() ? nullptr : context_stack.back();
    return cu::kSuccess;
}

cu::Result cuCtxPushCurrent_v2(cu::Context context) {
    ENTER();
    context_stack.push_back(context);
    return cu::kSuccess;
}

cu::Result cuCtxPopCurrent_v2(cu::Context* context) {
    ENTER_WITH_CONTEXT();
    *context = context_stack.back();
    context_stack.pop_back();
    return cu::kSuccess;
}

cu::Result cuCtxSynchronize() {
    ENTER_WITH_CONTEXT();
    return cu::kSuccess;
}

cu::Result cuLibraryLoadData(cu::Library* library, const void* image, int*, void**, unsigned, int*, void**,
                             unsigned) {
    ENTER();
    // The tables of sections come last in a file.
    const auto* const text = static_cast<const char*>(image);
    const bool is_elf = std::strncmp(text, ELFMAG, SELFMAG) == 0;
    Elf64_Ehdr header{};
    if (is_elf) {
        std::memcpy(&header, image, sizeof(header));
    }
    const bool has_info = header.e_shoff >= sizeof(header) + sizeof(flash8::KernelInfo);
    if (is_elf ? !has_info : std::strstr(text, ".version") == nullptr) {
        return kInvalidImage;
    }
    auto* loaded = new LoadedLibrary();
    if (is_elf) {
        std::memcpy(&loaded->info, text + sizeof(header), sizeof(loaded->info));
    }
    loaded->kernels[0].name = std::string(loaded->info.entry, strnlen(loaded->info.entry, 64));
    loaded->kernels[0].params_bytes = loaded->info.params_bytes;
    loaded->kernels[1].name = "plain";
    *library = reinterpret_cast<cu::Library>(loaded);
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().libraries.insert(loaded);
    return cu::kSuccess;
}

cu::Result cuLibraryUnload(cu::Library library) {
    ENTER();
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().libraries.erase(library);
    delete reinterpret_cast<LoadedLibrary*>(library);
    return cu::kSuccess;
}

cu::Result cuLibraryGetKernel(cu::Kernel* kernel, cu::Library library, const char* name) {
    ENTER();
    for (LoadedKernel& loaded : reinterpret_cast<LoadedLibrary*>(library)->kernels) {
        if (loaded.name == name) {
            *kernel = reinterpret_cast<cu::Kernel>(&loaded);
            return cu::kSuccess;
        }
    }
    return kNotFound;
}

cu::Result cuKernelGetFunction(cu::Function* function, cu::Kernel kernel) {
    ENTER_WITH_CONTEXT();
    *function = reinterpret_cast<cu::Function>(kernel);
    return cu::kSuccess;
}

cu::Result cuFuncGetAttribute(int* value, cu::FunctionAttribute attribute, cu::Function) {
    ENTER_WITH_CONTEXT();
    *value = attribute == cu::kNumRegs ? 168 : 0;
    return cu::kSuccess;
}

cu::Result cuFuncSetAttribute(cu::Function, cu::FunctionAttribute, int) {
    ENTER_WITH_CONTEXT();
    return cu::kSuccess;
}

cu::Result cuLaunchKernelEx(const cu::LaunchConfig* config, cu::Function function, void** parameters,
                            void**) {
    ENTER_WITH_CONTEXT();
    if (recording) {
        const std::lock_guard<std::mutex> lock(state().mutex);
        state().launches.push_back(describe(*config, function, parameters));
        const std::size_t bytes = reinterpret_cast<LoadedKernel*>(function)->params_bytes;
        state().parameters.emplace_back(static_cast<const char*>(parameters[0]), bytes);
    }
    return cu::kSuccess;
}

// The "descriptor" lists what it was made from, in eight-byte words; strides from word 9 on.
cu::Result cuTensorMapEncodeTiled(void* map, int element_type, std::uint32_t rank, void* address,
                                  const std::uint64_t* dims, const std::uint64_t* strides,
                                  const std::uint32_t* box, const std::uint32_t* element_strides,
                                  int interleave, int swizzle, int l2_promotion, int fill) {
    ENTER();
    const sim::TiledArguments arguments{map,          static_cast<std::uint32_t>(element_type),
                                        rank,         address,
                                        dims,         strides,
                                        box,          element_strides,
                                        interleave,   swizzle,
                                        l2_promotion, fill};
    if (recording && !sim::broken_rule(arguments).empty()) {
        return kInvalidValue;
    }
    auto* words = static_cast<std::uint64_t*>(map);
    words[0] = static_cast<std::uint64_t>(element_type);
    words[1] = rank;
    words[2] = reinterpret_cast<std::uint64_t>(address);
    words[3] = static_cast<std::uint64_t>(swizzle);
    words[4] = static_cast<std::uint64_t>(interleave + l2_promotion * 16 + fill * 256);
    words[5] = dims[rank - 1];
    words[6] = rank > 1 ? strides[rank - 2] : 0;
    words[7] = box[rank - 1];
    words[8] = element_strides[rank - 1];
    std::copy(strides, strides + rank - 1, words + 9);
    return cu::kSuccess;
}

cu::Result cuMemAlloc_v2(cu::DevicePtr* address, std::size_t bytes) {
    ENTER_WITH_CONTEXT();
    *address = reinterpret_cast<cu::DevicePtr>(std::malloc(bytes));
    const std::lock_guard<std::mutex> lock(state().mutex);
    ++state().allocations;
    return cu::kSuccess;
}

cu::Result cuMemFree_v2(cu::DevicePtr address) {
    ENTER_WITH_CONTEXT();
    std::free(reinterpret_cast<void*>(address));
    const std::lock_guard<std::mutex> lock(state().mutex);
    --state().allocations;
    return cu::kSuccess;
}

cu::Result cuMemcpyHtoD_v2(cu::DevicePtr to, const void* from, std::size_t bytes) {
    ENTER_WITH_CONTEXT();
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return cu::kSuccess;
}

cu::Result cuMemcpyDtoH_v2(void* to, cu::DevicePtr from, std::size_t bytes) {
    ENTER_WITH_CONTEXT();
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return cu::kSuccess;
}

cu::Result cuStreamCreate(cu::Stream* stream, unsigned) {
    ENTER_WITH_CONTEXT();
    *stream = reinterpret_cast<cu::Stream>(std::intptr_t{77});
    return cu::kSuccess;
}

cu::Result cuStreamDestroy_v2(cu::Stream) {
    ENTER_WITH_CONTEXT();
    return cu::kSuccess;
}

cu::Result cuStreamSynchronize(cu::Stream) {
    ENTER_WITH_CONTEXT();
    return cu::kSuccess;
}

cu::Result cuStreamIsCapturing(cu::Stream, int* status) {
    ENTER_WITH_CONTEXT();
    *status = capturing ? 1 : cu::kCaptureNone;
    return cu::kSuccess;
}

cu::Result cuThreadExchangeStreamCaptureMode(int* mode) {
    ENTER();
    std::swap(*mode, capture_mode);
    return cu::kSuccess;
}

}  // extern "C"

#define SAME_SIGNATURE(member, symbol, parameters) \
    static_assert(std::is_same_v<decltype(&symbol), decltype(cu::Entries::member.function)>);
FLASH8_DRIVER_ENTRIES(SAME_SIGNATURE)
