// Words for a launch that cannot go on.
#include <algorithm>

#include "cluster_run.h"
#include "errors.h"
#include "launch.h"
#include "mbarrier.h"
#include "register_budget.h"

namespace sim {
namespace {

std::string cta_name(const Cta& cta, bool in_cluster) {
    std::string text = format("CTA (%u, %u, %u)", cta.index.x, cta.index.y, cta.index.z);
    if (in_cluster) {
        text += format(" rank %u", cta.rank);
    }
    return text;
}

std::string describe_wait(Warp& w, const Fragment& fragment) {
    const Wait& wait = fragment.wait;
    switch (wait.kind) {
        case WaitKind::kMbarrier: {
            Cta& cta = *w.cta->cluster->ctas[wait.address >> kRankShift];
            const uint32_t offset = (wait.address & ((1u << kRankShift) - 1)) - kSharedBase;
            const std::string what = wait.parity == 2
                                         ? format("phase %llu", static_cast<unsigned long long>(wait.phase))
                                         : format("parity %u", wait.parity);
            return format("waits for %s of mbarrier 0x%x (%s)", what.c_str(), wait.address,
                          describe_mbarrier(cta, offset).c_str());
        }
        case WaitKind::kNamedBarrier: {
            const NamedBarrier& barrier = w.cta->barriers[wait.address];
            const uint32_t expected = barrier.expected == 0 ? w.cta->warps_alive * kLanes : barrier.expected;
            return format("waits at barrier %u (%u of %u threads arrived)", wait.address, barrier.arrived,
                          expected);
        }
        case WaitKind::kClusterBarrier:
            return "waits at the cluster's barrier";
        case WaitKind::kWgmma:
            return "waits in wgmma.wait_group for the other warps of its warpgroup";
        case WaitKind::kBulkGroup:
            return "waits for its bulk copies";
        case WaitKind::kCpAsync:
            return "waits for its cp.async";
        case WaitKind::kWarpSync:
            return format("waits for lanes 0x%08x of its warp", wait.member_mask & w.alive & ~fragment.mask);
        case WaitKind::kRegisters:
            return format(
                "waits for setmaxnreg.inc to %u registers, but the CTA's warps hold all but %llu of "
                "the %llu that it was launched with",
                wait.address, static_cast<unsigned long long>(w.cta->register_pool - registers_held(*w.cta)),
                static_cast<unsigned long long>(w.cta->register_pool));
        case WaitKind::kEarlierGrids: {
            const Launch* earlier = w.cta->cluster->launch->prerequisite;
            while (earlier->ended_clusters == earlier->cluster_count()) {
                earlier = earlier->prerequisite;
            }
            return format("waits for the grid of kernel %s, of whose %llu clusters %llu have ended",
                          earlier->kernel->name.c_str(),
                          static_cast<unsigned long long>(earlier->cluster_count()),
                          static_cast<unsigned long long>(earlier->ended_clusters.load()));
        }
        default:
            return "runs without any progress (polling?)";
    }
}

}  // namespace

std::string describe_stuck(Cluster& cluster) {
    std::string text;
    const Program& program = cluster.launch->kernel->program;
    for (auto& cta : cluster.ctas) {
        for (Warp& w : cta->warps) {
            for (const Fragment& fragment : w.fragments) {
                const Op& op = program.ops[std::min<size_t>(fragment.pc, program.ops.size() - 1)];
                text += format("\n  %s warp %u lanes 0x%08x at PTX line %d (%s): ",
                               cta_name(*cta, cluster.ctas.size() > 1).c_str(), w.index, fragment.mask,
                               op.line, program.names[fragment.pc].c_str());
                text += describe_wait(w, fragment);
            }
        }
    }
    return text;
}

std::string describe_not_begun(const Launch& launch) {
    const std::string text = "\n kernel " + launch.kernel->name + " has not begun: ";
    if (launch.may_begin()) {
        return text + "the device has no room for it beside those that run";
    }
    const Launch& earlier = *launch.prerequisite;
    if (launch.late_dependents) {
        return text + "under this seed it does when kernel " + earlier.kernel->name +
               " has ended, for nothing promises that the two overlap";
    }
    return text + format(
                      "of the %llu CTAs of kernel %s %llu have ended or issued "
                      "griddepcontrol.launch_dependents",
                      static_cast<unsigned long long>(earlier.grid.count()), earlier.kernel->name.c_str(),
                      static_cast<unsigned long long>(earlier.allowing_ctas.load()));
}

std::string locate_error(const Cluster& cluster, const std::string& message, int line) {
    const Kernel& kernel = *cluster.launch->kernel;
    std::string text = "kernel " + kernel.name;
    const Warp* w = cluster.running;
    const Program& program = kernel.program;
    size_t at = program.ops.size();
    if (w != nullptr) {
        text += ", " + cta_name(*w->cta, cluster.ctas.size() > 1) + format(", warp %u", w->index);
        if (!w->fragments.empty()) {
            at = std::min<size_t>(w->fragments[static_cast<size_t>(w->current)].pc, program.ops.size() - 1);
            line = line == 0 ? program.ops[at].line : line;
        }
    }
    // An engine's finding names the instruction that set it to work, not the one the warp is at.
    if (at == program.ops.size() || program.ops[at].line != line) {
        const auto same = [&](const Op& op) { return op.line == line && op.op_class != OpClass::kMove; };
        at = static_cast<size_t>(std::find_if(program.ops.begin(), program.ops.end(), same) -
                                 program.ops.begin());
    }
    if (line != 0) {
        text +=
            format(", PTX line %d", line) + (at < program.ops.size() ? " (" + program.names[at] + ")" : "");
    }
    return text + ": " + message;
}

}  // namespace sim
