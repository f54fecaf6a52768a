// Fences of memory and proxies, setmaxnreg, createpolicy.
#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "launch.h"
#include "register_budget.h"
#include "warp_sync.h"

namespace sim {
namespace {

Step nothing(Warp&, const Op&, uint32_t) {
    return Step::kNext;
}

// code: 1 for shared memory, 2 for global, 3 for both.
Step proxy_async(Warp& w, const Op& op, uint32_t mask) {
    if (w.cta->cluster->launch->config.check_races) {
        fence_proxy_async(w, mask, (op.code & 1) != 0, (op.code & 2) != 0);
    }
    return Step::kNext;
}

Step memory_fence(Warp& w, const Op& op, uint32_t mask) {
    if (w.cta->cluster->launch->config.check_races) {
        fence(w, op.level, mask);
    }
    return Step::kNext;
}

// Everything the warp has initialized so far; the fence names the thread's own, who is one thread mostly.
Step mbarrier_init_fence(Warp& w, const Op&, uint32_t) {
    set_clock(w.order.clock, agent_of(w, kInits), w.inits);
    return Step::kNext;
}

void decode_fence(Decoder& d) {
    d.op.op_class = OpClass::kFence;
    d.op.run = nothing;
    if (d.in().opcode == "membar") {
        const std::string kind = d.take_any({"cta", "gl", "sys", "proxy"});
        const bool async = d.take_any({"alias", "async"}, "") == "async";
        d.op.code = 3;
        d.op.level = kind == "cta" ? kCtaLevel : kGpuLevel;
        d.op.run = kind != "proxy" ? memory_fence : async ? proxy_async : nothing;
        return;
    }
    if (d.take("mbarrier_init")) {
        d.take_any({"release"});
        d.take_any({"cluster"});
        d.op.run = mbarrier_init_fence;
        return;
    }
    if (!d.take("proxy")) {
        d.take_any({"sc", "acq_rel", "acquire", "release"}, "");
        std::string rest;
        d.take_prefix("sync_restrict::", &rest);
        const std::string scope = d.take_any({"cta", "cluster", "gpu", "sys"});
        d.op.level = scope == "cta" ? kCtaLevel : scope == "cluster" ? kClusterLevel : kGpuLevel;
        d.op.run = memory_fence;
        return;
    }
    if (d.take("alias")) {
        return;
    }
    if (d.take("async")) {
        const Space space = d.take_space();
        d.op.code = space == Space::kGeneric ? 3 : space == Space::kGlobal ? 2 : 1;
        d.op.run = proxy_async;
        return;
    }
    // fence.proxy.tensormap::generic: a descriptor changed in memory is read afresh each time here.
    std::string rest;
    if (!d.take_prefix("tensormap::generic", &rest)) {
        return;
    }
    const std::string order = d.take_any({"acquire", "release"});
    d.take_any({"cta", "cluster", "gpu", "sys"});
    if (order == "acquire") {
        d.need_operands(2, 2);
        bool wide = false;
        d.op.a = d.address(d.operand(0), &wide);
    }
}

// setmaxnreg: what the CTA was launched with, less what its warps hold. inc waits for registers that a dec
// elsewhere gives back, for ever if no dec gives back enough.
Step setmaxnreg(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    Cta& cta = *w.cta;
    if (cta.register_pool == 0) {
        throw SimError(ErrorKind::kResources,
                       "ptxas ignores setmaxnreg here, because it cannot tell the registers at launch: the "
                       "kernel needs .maxnreg, or .minnctapersm beside .maxntid (__launch_bounds__(threads, "
                       "1))",
                       op.line);
    }
    const uint32_t wanted = static_cast<uint32_t>(op.imm);
    const bool increase = op.code != 0;
    if (increase ? wanted < w.registers_per_thread : wanted > w.registers_per_thread) {
        throw SimError(ErrorKind::kResources,
                       format("setmaxnreg.%s to %u, but the warp has %u registers a thread",
                              increase ? "inc" : "dec", wanted, w.registers_per_thread),
                       op.line);
    }
    const uint64_t others = registers_held(cta) - uint64_t{w.registers_per_thread} * kLanes;
    if (increase && others + uint64_t{wanted} * kLanes > cta.register_pool) {
        w.fragment().wait = Wait{};
        w.fragment().wait.kind = WaitKind::kRegisters;
        w.fragment().wait.address = wanted;
        return Step::kBlocked;
    }
    w.fragment().wait = Wait{};
    w.registers_per_thread = wanted;
    ++cta.cluster->progress;
    return Step::kNext;
}

void decode_setmaxnreg(Decoder& d) {
    d.op.op_class = OpClass::kControl;
    d.op.code = d.take_any({"inc", "dec"}) == "inc";
    d.take_any({"sync"});
    d.take_any({"aligned"});
    d.take_any({"u32"});
    d.need_operands(1, 1);
    const uint64_t count = d.integer(d.operand(0));
    if (count < 24 || count > 256 || count % 8 != 0) {
        d.fail("the register count must be a multiple of 8 in 24..256");
    }
    d.op.imm = static_cast<int64_t>(count);
    d.op.run = setmaxnreg;
}

// A cache policy is a hint: any value will do.
Step zero_policy(Warp& w, const Op& op, uint32_t mask) {
    const uint64_t zeros[kLanes] = {};
    merge(destination<uint64_t>(w, op.d), zeros, mask);
    return Step::kNext;
}

void decode_createpolicy(Decoder& d) {
    d.op.op_class = OpClass::kOther;
    d.take_any({"fractional", "range", "cvt"});
    std::string rest;
    while (d.take_prefix("L2", &rest)) {
    }
    d.take("global");
    d.take_any({"b64"});
    for (size_t i = 1; i < d.operand_count(); ++i) {
        if (d.operand(i).kind == Operand::kAddress) {
            bool wide = false;
            d.address(d.operand(i), &wide);
        }
    }
    d.op.d = d.dest(d.operand(0), 8);
    d.op.run = zero_policy;
}

}  // namespace

uint64_t registers_held(const Cta& cta) {
    uint64_t held = 0;
    for (const Warp& warp : cta.warps) {
        held += uint64_t{warp.registers_per_thread} * kLanes;  // warps that exited keep theirs
    }
    return held;
}

bool registers_available(const Warp& warp, uint32_t wanted) {
    const uint64_t others = registers_held(*warp.cta) - uint64_t{warp.registers_per_thread} * kLanes;
    return others + uint64_t{wanted} * kLanes <= warp.cta->register_pool;
}

void register_fences(DecodeTable& table) {
    table["fence"] = decode_fence;
    table["membar"] = decode_fence;
    table["setmaxnreg"] = decode_setmaxnreg;
    table["createpolicy"] = decode_createpolicy;
}

}  // namespace sim
