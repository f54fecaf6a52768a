#include "plan_cache/append_plan.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

namespace py = pybind11;

namespace flash8 {

namespace {

enum Rows : std::size_t { kQ, kK, kV };

constexpr std::size_t in_rows(Rows rows, std::size_t offset) {
    return offsetof(AppendParams, rows) + rows * sizeof(AppendedRows) + offset;
}

struct NamedPlace {
    std::string_view name;
    std::size_t offset;
};

// Every address in AppendParams that is an argument's, by flash_attn_with_kvcache's names.
constexpr NamedPlace kPlaces[] = {
    {"q", in_rows(kQ, offsetof(AppendedRows, x.ptr))},
    {"k", in_rows(kK, offsetof(AppendedRows, x.ptr))},
    {"v", in_rows(kV, offsetof(AppendedRows, x.ptr))},
    {"k_cache", in_rows(kK, offsetof(AppendedRows, out.ptr))},
    {"v_cache", in_rows(kV, offsetof(AppendedRows, out.ptr))},
    {"k_mean", in_rows(kK, offsetof(AppendedRows, mean.ptr))},
    {"v_mean", in_rows(kV, offsetof(AppendedRows, mean.ptr))},
    {"k_descale", in_rows(kK, offsetof(AppendedRows, descale.ptr))},
    {"v_descale", in_rows(kV, offsetof(AppendedRows, descale.ptr))},
    {"cu_seqlens_q", in_rows(kQ, offsetof(AppendedRows, cu_seqlens))},
    {"cu_seqlens_k_new", in_rows(kK, offsetof(AppendedRows, cu_seqlens))},
    {"cu_seqlens_k_new", in_rows(kV, offsetof(AppendedRows, cu_seqlens))},
    {"q_norm_weight", in_rows(kQ, offsetof(AppendedRows, norm_weight))},
    {"k_norm_weight", in_rows(kK, offsetof(AppendedRows, norm_weight))},
    {"rotary_cos", offsetof(AppendParams, rotary.cos)},
    {"rotary_sin", offsetof(AppendParams, rotary.sin)},
    {"cache_seqlens", offsetof(AppendParams, place.cache_seqlens)},
    {"page_table", offsetof(AppendParams, place.page_table)},
    {"cache_batch_idx", offsetof(AppendParams, place.kv_batch_idx)},
};
constexpr std::size_t kOffsets = offsetof(AppendParams, rotary.offsets);

const CallKey::Tensor* find(const CallKey& key, std::string_view name) {
    const auto* const found = std::find_if(
        key.begin(), key.end(), [&](const CallKey::Tensor& tensor) { return tensor.argument->name == name; });
    return found == key.end() ? nullptr : found;
}

std::uintptr_t between_caches(const CallKey& key) {
    return find(key, "v_cache")->view.address - find(key, "k_cache")->view.address;
}

}  // namespace

bool AppendPlan::learn(const CallKey& key) {
    for (std::size_t i = 0; i < launches_.size(); ++i) {
        const AppendParams& params = launches_[i].params;
        const auto learn_place = [&](std::string_view name, std::size_t offset) {
            const std::uintptr_t address = address_at(params, offset);
            const CallKey::Tensor* const tensor = find(key, name);
            if (address != 0 && (tensor == nullptr || tensor->view.address != address)) {
                return false;
            }
            if (address != 0) {
                places_.push_back({i, offset, static_cast<std::size_t>(tensor - key.begin())});
            }
            return true;
        };
        const char* const offsets =
            find(key, "rotary_seqlens") != nullptr ? "rotary_seqlens" : "cache_seqlens";
        if (!learn_place(offsets, kOffsets) ||
            !std::all_of(std::begin(kPlaces), std::end(kPlaces),
                         [&](const NamedPlace& place) { return learn_place(place.name, place.offset); })) {
            return false;
        }
    }
    between_caches_ = between_caches(key);
    return true;
}

bool AppendPlan::may_write(const CallKey& key) const {
    const TensorView& k_cache = find(key, "k_cache")->view;
    const TensorView& v_cache = find(key, "v_cache")->view;
    for (const char* const name : {"q", "qv", "k", "v"}) {
        const CallKey::Tensor* const read = find(key, name);
        if (read != nullptr && (spans_meet(read->view, k_cache) || spans_meet(read->view, v_cache))) {
            return false;
        }
    }
    return !spans_meet(k_cache, v_cache) || between_caches(key) == between_caches_;
}

AppendPlan::Made AppendPlan::make(const CallKey& key, const TorchTensors& torch,
                                  std::vector<Launch>& launches) const {
    Made made{py::none(), py::none()};
    if (is_ahead()) {
        made.lengths = torch.new_like(lengths_like_);
        made.lengths_address = torch.address_of(made.lengths);
    }
    if (rotates()) {
        made.rotated = torch.new_like(rotated_like_);
        made.rotated_address = torch.address_of(made.rotated);
    }
    launches = launches_;
    for (const Place& place : places_) {
        put_address(launches[place.launch].params, place.offset, key.begin()[place.tensor].view.address);
    }
    for (Launch& launch : launches) {
        AppendedRows& q = launch.params.rows[kQ];
        if (rotates() && q.heads > 0) {
            q.out.ptr = reinterpret_cast<void*>(made.rotated_address);
        }
        if (launch.params.lengths != nullptr) {
            launch.params.lengths = reinterpret_cast<std::int32_t*>(made.lengths_address);
        }
    }
    return made;
}

std::uintptr_t AppendPlan::lengths_address() const {
    for (const Launch& launch : launches_) {
        if (launch.params.lengths != nullptr) {
            return reinterpret_cast<std::uintptr_t>(launch.params.lengths);
        }
    }
    return 0;
}

std::uintptr_t AppendPlan::rotated_address() const {
    for (const Launch& launch : launches_) {
        if (launch.params.rows[kQ].heads > 0) {
            return reinterpret_cast<std::uintptr_t>(launch.params.rows[kQ].out.ptr);
        }
    }
    return 0;
}

}  // namespace flash8
