#include "kernels/launch_schedule.h"

#include "driver/launch.h"
#include "driver/require.h"
#include "kernels/attention_checks.h"

namespace flash8 {

namespace {

constexpr const char* kCall = "schedule";
constexpr std::int32_t kSplitUnit = 64;
constexpr std::int32_t kMostNewKeys = 1 << 30;

void check_tile(const ScheduleParams& call) {
    require(call.block_m == 8 || call.block_m == 16 || call.block_m == 32, "schedule: block_m is ",
            call.block_m, "; tiles have 8, 16 or 32 rows");
    require(call.element_bytes == 1 || call.element_bytes == 2, "schedule: element_bytes is ",
            call.element_bytes, "; a cache has elements of 1 or 2");
    require(call.tile_head_dim >= 1 && call.tile_head_dim_v >= 1, "schedule: tile_head_dim is ",
            call.tile_head_dim, " and tile_head_dim_v ", call.tile_head_dim_v, "; both must be positive");
}

void check_counts(const DecodeParams& call) {
    check_sequences(kCall, call.sequences);
    require(call.heads_kv >= 1 && call.heads_q >= 1 && call.heads_q % call.heads_kv == 0,
            "schedule: heads_q is ", call.heads_q, " and heads_kv ", call.heads_kv,
            "; heads_q must be a positive multiple of heads_kv");
    require(call.split_keys >= 0 && call.split_keys % kSplitUnit == 0, "schedule: split_keys is ",
            call.split_keys, "; it must be a multiple of ", kSplitUnit, ", and not negative");
}

}  // namespace

void launch_schedule(Kernel& kernel, int device, std::uint64_t stream, const ScheduleParams& call) {
    require(kernel.info().has_value(), "schedule: ", kernel.name(), " exports no kernel_info");
    const KernelInfo& info = *kernel.info();
    require(info.kind == KernelKind::kDecodeSchedule, "schedule: ", kernel.name(),
            " makes no scheduler metadata");
    check_tile(call);
    check_counts(call.call);
    require(call.seqlen_k_new >= 0 && call.seqlen_k_new <= kMostNewKeys, "schedule: seqlen_k_new is ",
            call.seqlen_k_new, "; it must be from 0 to ", kMostNewKeys);
    const auto address = reinterpret_cast<std::uintptr_t>(call.scheduler_metadata);
    require(address != 0 && address % sizeof(std::int32_t) == 0,
            "schedule: scheduler_metadata is at address ", address,
            "; it must be a multiple of 4 and not null");
    launch(kernel, device, stream, shape_of(info, {1, 1, 1}), {{&call, sizeof(call)}});
}

}  // namespace flash8
