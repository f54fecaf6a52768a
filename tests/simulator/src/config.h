// What a run may choose: schedules, checks, numerics. From FLASH8_SIM_* or flash8_sim_configure.
#pragma once

#include <cstdint>
#include <string>

namespace sim {

// When work beside the warps (TMA, wgmma, cp.async) completes.
enum class AsyncPolicy { kEarly, kLate, kRandom };

struct Config {
    uint64_t seed = 0;  // 0: plain order, everything early; otherwise adversarial
    AsyncPolicy async = AsyncPolicy::kEarly;
    bool async_set = false;             // chosen by hand, not by the seed
    uint32_t quantum = 0;               // instructions a warp runs at a time; 0: by the seed
    uint32_t threads = 1;               // host threads, a cluster each
    uint32_t multiprocessors = 132;     // what cuDeviceGetAttribute says, and CTAs that are resident
    uint64_t stall_limit = 20'000'000;  // warp instructions of a cluster without any progress

    bool check_uninitialized = true;         // shared memory and registers nobody wrote
    bool check_uninitialized_global = true;  // allocations nobody wrote
    bool check_wgmma = true;                 // accumulators, operands and fences
    bool check_races = true;                 // shared memory, and the async proxy
    bool cp_async_fence = true;  // cp.async before the async proxy needs fence.proxy.async, as PTX says
    bool exact_16bit = true;     // Hopper's accumulation for 16-bit wgmma; false: plain fp32
    bool exact_8bit = true;
    bool strict_global = true;  // global memory must be known (allocated or registered)
    bool timeline = false;
    std::string watch;  // the kernel whose launches report and timeline are of; empty: any

    bool any_register_check() const { return check_uninitialized || check_wgmma; }
    // One "name": value of the JSON, or NAME=value of the environment; throws SimError on a bad one.
    void set(const std::string& name, const std::string& value);
    void set_json(const std::string& json);
    void set_from_environment();
};

Config& global_config();

}  // namespace sim
