#include "kernels/launch_append.h"

#include <algorithm>
#include <cmath>

#include "driver/launch.h"
#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::int64_t kMostItems = 2147483647;
constexpr std::int64_t kMostHeads = 65535;  // of a grid's second dimension
constexpr std::int64_t kChannels = 8;       // of a thread
constexpr std::int64_t kAccessBytes = 16;
constexpr std::int64_t kRotaryUnit = 2 * kChannels;  // both channels of a thread's pairs are in one half
constexpr const char* kNames[] = {"q", "k", "v"};

void check_address(const char* rows, const char* name, const void* pointer) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    require(address != 0 && address % kAccessBytes == 0, "append: ", name, " of ", rows, " is at address ",
            address, "; it must be a multiple of ", kAccessBytes, " and not null");
}

void check_tensor(const char* rows, const char* name, const TensorRef& ref) {
    check_address(rows, name, ref.ptr);
    for (const std::int64_t stride : {ref.batch_stride, ref.row_stride, ref.head_stride}) {
        require(stride % kChannels == 0, "append: a stride of ", name, " of ", rows, " is ", stride,
                " elements; it must be a multiple of ", kChannels);
    }
}

void check_rotary(const RotaryParams& rotary) {
    require(rotary.cos != nullptr && rotary.sin != nullptr && rotary.positions >= 1,
            "append: rotary.cos or rotary.sin is null, or rotary.positions is ", rotary.positions,
            "; rows that rotate need a table");
    check_address("rotary", "cos", rotary.cos);
    check_address("rotary", "sin", rotary.sin);
    for (const std::int64_t stride : {rotary.cos_stride, rotary.sin_stride}) {
        require(stride % kChannels == 0, "append: a stride of rotary is ", stride,
                " elements; it must be a multiple of ", kChannels);
    }
    require(rotary.rotary_dim >= kRotaryUnit && rotary.rotary_dim % kRotaryUnit == 0,
            "append: rotary.rotary_dim is ", rotary.rotary_dim, "; it must be a multiple of ", kRotaryUnit);
}

void check_rows(const AppendedRows& rows, const char* name, const RotaryParams& rotary) {
    require(rows.head_dim >= kChannels && rows.head_dim % kChannels == 0, "append: head_dim of ", name,
            " is ", rows.head_dim, "; it must be a multiple of ", kChannels);
    require(rows.tokens >= 0 && rows.seqlen >= 0, "append: ", name, " has ", rows.tokens, " tokens, ",
            rows.seqlen, " a sequence; neither may be negative");
    require(rows.tokens == 0 || rows.cu_seqlens != nullptr || rows.seqlen > 0, "append: ", name, " has ",
            rows.tokens, " tokens in dense sequences of none");
    const std::int64_t most = (kMostItems - 1024) / (rows.head_dim / kChannels);
    require(rows.tokens <= most, "append: ", name, " has ", rows.tokens, " tokens; supported are up to ",
            most, " with head_dim ", rows.head_dim);
    if (rows.tokens == 0) {
        return;
    }
    check_tensor(name, "x", rows.x);
    check_tensor(name, "out", rows.out);
    if (rows.mean.ptr != nullptr) {
        check_address(name, "mean", rows.mean.ptr);
    }
    if (rows.norm_weight != nullptr) {
        check_address(name, "norm_weight", rows.norm_weight);
        require(std::isfinite(rows.norm_eps) && rows.norm_eps >= 0, "append: norm_eps of ", name, " is ",
                rows.norm_eps, "; it must be finite and not negative");
    }
    require(rows.rotates == 0 || rotary.rotary_dim <= rows.head_dim, "append: rotary.rotary_dim is ",
            rotary.rotary_dim, ", more than head_dim of ", name, ", ", rows.head_dim);
}

void check_place(const AppendParams& call) {
    const PlaceParams& place = call.place;
    const bool writes = call.rows[1].heads > 0 || call.rows[2].heads > 0;
    require(place.cache_seqlens != nullptr || !(writes || call.lengths != nullptr),
            "append: place.cache_seqlens is null; new keys and values need it");
    require(!writes || (place.slot_tokens >= 1 && place.num_slots >= 1), "append: the cache has ",
            place.num_slots, " slots of ", place.slot_tokens, " tokens; both must be positive");
}

}  // namespace

AppendItems check_append(const AppendParams& call) {
    AppendItems found{1, 0};
    for (std::size_t i = 0; i < std::size(call.rows); ++i) {
        const AppendedRows& rows = call.rows[i];
        require(rows.heads >= 0, "append: ", kNames[i], " has ", rows.heads, " heads");
        if (rows.heads == 0) {
            continue;
        }
        if (rows.rotates != 0) {
            check_rotary(call.rotary);
        }
        check_rows(rows, kNames[i], call.rotary);
        found.heads += rows.heads;
        found.of_head = std::max(found.of_head, std::int64_t{rows.tokens} * (rows.head_dim / kChannels));
    }
    check_place(call);
    return found;
}

void launch_append(Kernel& kernel, int device, std::uint64_t stream, const AppendParams& call) {
    require(kernel.info().has_value(), "append: ", kernel.name(), " exports no kernel_info");
    const KernelInfo& info = *kernel.info();
    require(info.kind == KernelKind::kQuantizeAppend, "append: ", kernel.name(),
            " is not an appending kernel");
    require(call.batch >= 0, "append: batch is ", call.batch, "; it must not be negative");
    if (call.batch == 0) {
        return;
    }
    const auto [items, heads] = check_append(call);
    require(heads >= 1 && heads <= kMostHeads, "append: q, k and v have ", heads,
            " heads; supported are 1 to ", kMostHeads);
    const std::int64_t threads = info.threads;
    launch(kernel, device, stream, shape_of(info, {(items + threads - 1) / threads, heads, 1}),
           {{&call, sizeof(call)}});
}

}  // namespace flash8
