// Launches, the simulator's configuration, and what it says afterwards.
#include "driver_launch.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "driver_types.h"
#include "grid_chain.h"
#include "launch.h"
#include "launch_checks.h"
#include "memory_map.h"

namespace {

using namespace sim::driver;

constexpr int kProgrammaticSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct LastReport {
    std::mutex mutex;
    sim::Statistics statistics;  // of all launches since the last reset
    std::string launch_json;     // of the last launch that is watched, or that failed
    std::string timeline;
    uint64_t launches = 0;
};
LastReport& report() {
    static LastReport the_report;
    return the_report;
}

std::string escape(const std::string& text) {
    std::string result;
    for (char c : text) {
        if (c == '"' || c == '\\') {
            result += '\\';
        }
        result += c == '\n' ? std::string("\\n") : std::string(1, c);
    }
    return result;
}

[[noreturn]] void refuse(sim::ErrorKind kind, const sim::Kernel& kernel, const std::string& message) {
    throw sim::SimError(kind, "kernel " + kernel.name + ": " + message);
}

void gather_params(sim::Launch& launch, void** kernel_params, void** extra) {
    const sim::KernelAst& ast = launch.kernel->ast;
    // One tensor map at least: a kernel may take the address of its parameters.
    launch.params.assign((ast.param_bytes + 63) / 64 * 64 + 64, 0);
    if (kernel_params != nullptr) {
        for (size_t i = 0; i < ast.params.size(); ++i) {
            std::memcpy(launch.params.data() + ast.params[i].offset, kernel_params[i], ast.params[i].size);
        }
        return;
    }
    if (extra == nullptr) {
        if (!ast.params.empty()) {
            refuse(sim::ErrorKind::kInvalidValue, *launch.kernel, "no parameters given");
        }
        return;
    }
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (size_t i = 0; extra[i] != nullptr; i += 2) {
        if (extra[i] == reinterpret_cast<void*>(1)) {
            buffer = extra[i + 1];
        } else if (extra[i] == reinterpret_cast<void*>(2)) {
            bytes = *static_cast<size_t*>(extra[i + 1]);
        }
    }
    std::memcpy(launch.params.data(), buffer, std::min<size_t>(bytes, ast.param_bytes));
}

std::string launch_json(const sim::Launch& launch, bool ok, const std::string& error) {
    return "{\"kernel\": \"" + escape(launch.kernel->name) + "\", \"ok\": " + (ok ? "true" : "false") +
           ", \"error\": \"" + escape(error) + "\", \"statistics\": " + launch.statistics.json(true) + "}";
}

using Launches = std::vector<std::unique_ptr<sim::Launch>>;

// Each is dependent on the one before it, and all but the last let dependents begin early.
int execute(const Launches& launches, void* stream) {
    std::vector<sim::Launch*> all;
    for (const auto& launch : launches) {
        all.push_back(launch.get());
    }
    const bool ok = sim::run_launches(all);
    if (ok) {
        sim::leave_chain(*all.back(), stream);
    }
    const auto failed =
        std::find_if(all.begin(), all.end(), [](const sim::Launch* each) { return each->failed.load(); });
    const std::string error = ok ? std::string() : (*failed)->error;
    const sim::Launch& newest = *all.back();
    LastReport& last = report();
    const std::lock_guard<std::mutex> lock(last.mutex);
    for (const sim::Launch* launch : all) {
        last.statistics.add(launch->statistics);
        ++last.launches;
    }
    const std::string& watched = newest.config.watch;
    const bool is_watched = watched.empty() || watched == newest.kernel->name;
    if (newest.config.timeline && is_watched) {
        last.timeline = sim::timeline_json(newest.timeline);
    }
    if (is_watched || !ok) {
        last.launch_json = launch_json(newest, ok, error);
    }
    if (!ok) {
        set_last_error(error);
        return result_of((*failed)->error_kind);
    }
    return kSuccess;
}

constexpr size_t kMostTogether = 16;

struct Held {
    std::mutex mutex;
    Launches launches;
    void* stream = nullptr;
    int late_result = kSuccess;  // of launches whose calls have returned
    std::string late_error;

    ~Held() {
        for (const auto& launch : launches) {
            std::fprintf(stderr, "simulated device: kernel %s never ran, for nothing waited for it\n",
                         launch->kernel->name.c_str());
        }
        if (late_result != kSuccess) {
            std::fprintf(stderr, "simulated device: an error that no call returned: %s\n",
                         late_error.c_str());
        }
    }

    void run() {
        if (launches.empty()) {
            return;
        }
        const Launches all = std::exchange(launches, {});
        const int result = guarded([&] { return execute(all, stream); });
        if (result != kSuccess && late_result == kSuccess) {
            late_result = result;
            late_error = last_error();
        }
    }

    int take_late_error() {
        if (late_result != kSuccess) {
            set_last_error(std::exchange(late_error, {}));
        }
        return std::exchange(late_result, static_cast<int>(kSuccess));
    }
};
Held& held() {
    static Held the_held;
    return the_held;
}

// Runs it, together with those that are held, or holds it back as well.
int submit(std::unique_ptr<sim::Launch> launch, void* stream, bool dependent) {
    Held& before = held();
    std::unique_lock<std::mutex> lock(before.mutex);
    const bool together = dependent && !before.launches.empty() && before.stream == stream &&
                          before.launches.size() < kMostTogether &&
                          sim::can_follow(*launch, *before.launches.back());
    if (!together) {
        before.run();
    }
    const int late = before.take_late_error();
    if (late != kSuccess) {
        return late;
    }
    if (together) {
        sim::follow(*launch, *before.launches.back());
    } else {
        sim::join_chain(*launch, stream, dependent);
    }
    const bool hold = launch->kernel->program.launches_dependents && launch->config.threads == 1;
    before.launches.push_back(std::move(launch));
    before.stream = stream;
    if (hold) {
        return kSuccess;
    }
    const Launches all = std::exchange(before.launches, {});
    if (!together) {
        lock.unlock();
    }
    return execute(all, stream);
}

}  // namespace

void sim::driver::run_held_launches() {
    const std::lock_guard<std::mutex> lock(held().mutex);
    held().run();
}

int sim::driver::wait_for_launches() {
    const std::lock_guard<std::mutex> lock(held().mutex);
    held().run();
    sim::end_chain();
    return held().take_late_error();
}

SIM_EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** kernel_params,
                                void** extra) {
    return guarded([&]() -> int {
        if (function == nullptr) {
            return kInvalidHandle;
        }
        auto launch = std::make_unique<sim::Launch>();
        launch->kernel = static_cast<const sim::Kernel*>(function);
        launch->grid = {config->grid_x, config->grid_y, config->grid_z};
        launch->block = {config->block_x, config->block_y, config->block_z};
        launch->dynamic_shared = config->shared_bytes;
        bool dependent = false;
        sim::Dim3 cluster;
        bool names_cluster = false;
        for (unsigned i = 0; i < config->attribute_count; ++i) {
            const LaunchAttribute& attribute = config->attributes[i];
            dependent =
                dependent || (attribute.id == kProgrammaticSerialization && attribute.value.flag != 0);
            if (attribute.id == 4) {
                names_cluster = true;
                cluster = {attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z};
            }
        }
        sim::choose_cluster(*launch, names_cluster ? &cluster : nullptr);
        sim::check_limits(*launch);
        gather_params(*launch, kernel_params, extra);
        launch->config = sim::global_config();
        launch->memory = sim::MemoryMap::instance().snapshot();
        return submit(std::move(launch), config->stream, dependent);
    });
}

SIM_EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, void* stream, void** kernel_params,
                              void** extra) {
    const LaunchConfig config{gx, gy, gz, bx, by, bz, shared, stream, nullptr, 0};
    return cuLaunchKernelEx(&config, function, kernel_params, extra);
}

// {"seed": 7, "checks": false}: for the launches that follow. See docs/simulator.md for the names.
SIM_EXPORT int flash8_sim_configure(const char* json) {
    run_held_launches();
    return guarded([&] {
        sim::Config changed = sim::global_config();
        changed.set_json(json);
        sim::global_config() = changed;
        return kSuccess;
    });
}

// The JSON of the last launch, of the watched kernel if one is named; valid until the next one.
SIM_EXPORT const char* flash8_sim_report() {
    run_held_launches();
    return report().launch_json.c_str();
}
SIM_EXPORT const char* flash8_sim_timeline() {
    run_held_launches();
    return report().timeline.c_str();
}
SIM_EXPORT const char* flash8_sim_totals() {
    run_held_launches();
    static thread_local std::string text;
    LastReport& last = report();
    const std::lock_guard<std::mutex> lock(last.mutex);
    text = "{\"launches\": " + std::to_string(last.launches) +
           ", \"statistics\": " + last.statistics.json(false) + "}";
    return text.c_str();
}
SIM_EXPORT void flash8_sim_reset() {
    run_held_launches();
    LastReport& last = report();
    const std::lock_guard<std::mutex> lock(last.mutex);
    last.statistics = sim::Statistics();
    last.launches = 0;
}
