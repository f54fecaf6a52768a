// %tid, %ctaid, %laneid ... as moves into a register.
#include <chrono>
#include <unordered_map>

#include "decoder.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

enum Special : int64_t {
    kTidX,
    kTidY,
    kTidZ,
    kNtidX,
    kNtidY,
    kNtidZ,
    kCtaidX,
    kCtaidY,
    kCtaidZ,
    kNctaidX,
    kNctaidY,
    kNctaidZ,
    kLaneid,
    kWarpid,
    kNwarpid,
    kSmid,
    kNsmid,
    kGridid,
    kClusteridX,
    kClusteridY,
    kClusteridZ,
    kNclusteridX,
    kNclusteridY,
    kNclusteridZ,
    kClusterCtaidX,
    kClusterCtaidY,
    kClusterCtaidZ,
    kClusterNctaidX,
    kClusterNctaidY,
    kClusterNctaidZ,
    kClusterCtarank,
    kClusterNctarank,
    kIsExplicitCluster,
    kLanemaskEq,
    kLanemaskLe,
    kLanemaskLt,
    kLanemaskGe,
    kLanemaskGt,
    kClock,
    kClockHi,
    kClock64,
    kGlobaltimer,
    kDynamicSmemSize,
    kTotalSmemSize
};

const std::unordered_map<std::string, Special>& names() {
    static const std::unordered_map<std::string, Special> all = {{"%tid.x", kTidX},
                                                                 {"%tid.y", kTidY},
                                                                 {"%tid.z", kTidZ},
                                                                 {"%ntid.x", kNtidX},
                                                                 {"%ntid.y", kNtidY},
                                                                 {"%ntid.z", kNtidZ},
                                                                 {"%ctaid.x", kCtaidX},
                                                                 {"%ctaid.y", kCtaidY},
                                                                 {"%ctaid.z", kCtaidZ},
                                                                 {"%nctaid.x", kNctaidX},
                                                                 {"%nctaid.y", kNctaidY},
                                                                 {"%nctaid.z", kNctaidZ},
                                                                 {"%laneid", kLaneid},
                                                                 {"%warpid", kWarpid},
                                                                 {"%nwarpid", kNwarpid},
                                                                 {"%smid", kSmid},
                                                                 {"%nsmid", kNsmid},
                                                                 {"%gridid", kGridid},
                                                                 {"%clusterid.x", kClusteridX},
                                                                 {"%clusterid.y", kClusteridY},
                                                                 {"%clusterid.z", kClusteridZ},
                                                                 {"%nclusterid.x", kNclusteridX},
                                                                 {"%nclusterid.y", kNclusteridY},
                                                                 {"%nclusterid.z", kNclusteridZ},
                                                                 {"%cluster_ctaid.x", kClusterCtaidX},
                                                                 {"%cluster_ctaid.y", kClusterCtaidY},
                                                                 {"%cluster_ctaid.z", kClusterCtaidZ},
                                                                 {"%cluster_nctaid.x", kClusterNctaidX},
                                                                 {"%cluster_nctaid.y", kClusterNctaidY},
                                                                 {"%cluster_nctaid.z", kClusterNctaidZ},
                                                                 {"%cluster_ctarank", kClusterCtarank},
                                                                 {"%cluster_nctarank", kClusterNctarank},
                                                                 {"%is_explicit_cluster", kIsExplicitCluster},
                                                                 {"%lanemask_eq", kLanemaskEq},
                                                                 {"%lanemask_le", kLanemaskLe},
                                                                 {"%lanemask_lt", kLanemaskLt},
                                                                 {"%lanemask_ge", kLanemaskGe},
                                                                 {"%lanemask_gt", kLanemaskGt},
                                                                 {"%clock", kClock},
                                                                 {"%clock_hi", kClockHi},
                                                                 {"%clock64", kClock64},
                                                                 {"%globaltimer", kGlobaltimer},
                                                                 {"%dynamic_smem_size", kDynamicSmemSize},
                                                                 {"%total_smem_size", kTotalSmemSize}};
    return all;
}

uint64_t thread_coordinate(const Warp& w, const Dim3& block, int axis, int lane) {
    const uint32_t linear = w.index * kLanes + static_cast<uint32_t>(lane);
    return axis == 0   ? linear % block.x
           : axis == 1 ? linear / block.x % block.y
                       : linear / (block.x * block.y);
}

uint32_t pick(const Dim3& d, int64_t axis) {
    return axis == 0 ? d.x : axis == 1 ? d.y : d.z;
}

uint64_t lane_mask(int64_t special, int lane) {
    const uint32_t eq = uint32_t{1} << lane;
    switch (special) {
        case kLanemaskEq:
            return eq;
        case kLanemaskLt:
            return eq - 1;
        case kLanemaskLe:
            return (eq - 1) | eq;
        case kLanemaskGt:
            return ~((eq - 1) | eq);
        default:
            return ~(eq - 1) & kAllLanes;
    }
}

uint64_t value_of(const Warp& w, int64_t s, int lane) {
    const Cta& cta = *w.cta;
    const Cluster& cluster = *cta.cluster;
    const Launch& launch = *cluster.launch;
    if (s <= kTidZ) {
        return thread_coordinate(w, launch.block, static_cast<int>(s - kTidX), lane);
    }
    if (s <= kNtidZ) {
        return pick(launch.block, s - kNtidX);
    }
    if (s <= kCtaidZ) {
        return pick(cta.index, s - kCtaidX);
    }
    if (s <= kNctaidZ) {
        return pick(launch.grid, s - kNctaidX);
    }
    if (s >= kClusteridX && s <= kClusteridZ) {
        return pick(cluster.index, s - kClusteridX);
    }
    if (s >= kNclusteridX && s <= kNclusteridZ) {
        return pick(launch.grid, s - kNclusteridX) / pick(launch.cluster, s - kNclusteridX);
    }
    if (s >= kClusterCtaidX && s <= kClusterCtaidZ) {
        return pick(cta.index, s - kClusterCtaidX) % pick(launch.cluster, s - kClusterCtaidX);
    }
    if (s >= kClusterNctaidX && s <= kClusterNctaidZ) {
        return pick(launch.cluster, s - kClusterNctaidX);
    }
    if (s >= kLanemaskEq && s <= kLanemaskGt) {
        return lane_mask(s, lane);
    }
    switch (s) {
        case kLaneid:
            return static_cast<uint64_t>(lane);
        case kWarpid:
            return w.index;
        case kNwarpid:
            return cta.warps.size();
        case kSmid:
            return (cluster.number * cluster.ctas.size() + cta.rank) % launch.config.multiprocessors;
        case kNsmid:
            return launch.config.multiprocessors;
        case kClusterCtarank:
            return cta.rank;
        case kClusterNctarank:
            return cluster.ctas.size();
        case kIsExplicitCluster:
            return cluster.ctas.size() > 1;
        case kClock:
        case kClock64:
            return w.time;
        case kClockHi:
            return w.time >> 32;
        case kGlobaltimer:
            return cluster.executed;
        case kDynamicSmemSize:
            return launch.dynamic_shared;
        case kTotalSmemSize:
            return cta.shared.size() + kSharedBase;
        default:
            return 0;
    }
}

template <class T>
Step move_special(Warp& w, const Op& op, uint32_t mask) {
    T values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        values[i] = static_cast<T>(value_of(w, op.imm, i));
    }
    merge(destination<T>(w, op.d), values, mask);
    return Step::kNext;
}

Step move_special_pred(Warp& w, const Op& op, uint32_t mask) {
    set_predicate(w, op.p, value_of(w, op.imm, 0) != 0 ? kAllLanes : 0, mask);
    return Step::kNext;
}

}  // namespace

Handler special_register_handler(const std::string& name, uint32_t bytes, int64_t* code) {
    const auto found = names().find(name);
    if (found == names().end()) {
        return nullptr;
    }
    *code = found->second;
    if (bytes == 0) {
        return move_special_pred;
    }
    return bytes == 8 ? move_special<uint64_t> : bytes == 4 ? move_special<uint32_t> : move_special<uint16_t>;
}

}  // namespace sim
