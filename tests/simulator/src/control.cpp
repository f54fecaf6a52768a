#include "control.h"

#include "decoder.h"
#include "grid_chain.h"
#include "lanes.h"
#include "launch.h"
#include "scheduler.h"

namespace sim {
namespace {

void drop_current(Warp& w) {
    w.fragments.erase(w.fragments.begin() + w.current);
    w.current = 0;
}

// Lanes leave join `index` (and all around it): when nobody is left to wait for, it goes on.
void settle_join(Warp& w, int index) {
    while (index >= 0) {
        Join& join = w.joins[static_cast<size_t>(index)];
        if (join.pending != 0 || !join.live) {
            return;
        }
        join.live = false;
        if (join.arrived != 0) {
            Fragment fragment;
            fragment.mask = join.arrived;
            fragment.pc = join.pc + 1;
            fragment.join = join.parent;
            // The lanes that went on belong to the fragment that ran last: it stays the current one.
            w.fragments.insert(w.fragments.begin(), fragment);
            w.current = 0;
            return;
        }
        index = join.parent;
    }
}

int new_join(Warp& w, uint32_t pc, uint32_t mask, int parent) {
    Join join;
    join.pc = pc;
    join.pending = mask;
    join.parent = parent;
    join.live = true;
    for (size_t i = 0; i < w.joins.size(); ++i) {
        if (!w.joins[i].live) {
            w.joins[i] = join;
            return static_cast<int>(i);
        }
    }
    w.joins.push_back(join);
    return static_cast<int>(w.joins.size()) - 1;
}

Step branch(Warp& w, const Op& op, uint32_t taken) {
    Fragment& f = w.fragment();
    const uint32_t stay = f.mask & ~taken;
    if (stay == 0) {
        f.pc = op.target;
        return Step::kJump;
    }
    if (taken == 0) {
        f.pc += 1;
        return Step::kJump;
    }
    int join = f.join;
    const bool known = join >= 0 && w.joins[static_cast<size_t>(join)].pc == op.target2;
    if (op.target2 != kNone && !known) {
        join = new_join(w, op.target2, f.mask, f.join);
    }
    Fragment other;
    other.mask = taken;
    other.pc = op.target;
    other.join = join;
    f.mask = stay;
    f.pc += 1;
    f.join = join;
    w.fragments.push_back(other);
    return Step::kJump;
}

Step join_point(Warp& w, const Op&, uint32_t) {
    Fragment& f = w.fragment();
    const int index = f.join;
    if (index < 0 || w.joins[static_cast<size_t>(index)].pc != f.pc) {
        return Step::kNext;
    }
    Join& join = w.joins[static_cast<size_t>(index)];
    join.arrived |= f.mask;
    join.pending &= ~f.mask;
    drop_current(w);
    settle_join(w, index);
    return Step::kJump;
}

Step exit_op(Warp& w, const Op&, uint32_t mask) {
    if (mask == 0) {
        return Step::kNext;
    }
    return exit_lanes(w, mask);
}

Step trap_op(Warp& w, const Op& op, uint32_t mask) {
    throw SimError(ErrorKind::kTrap,
                   format("%s executed by lanes 0x%08x", w.program->names[w.fragment().pc].c_str(), mask),
                   op.line);
}

Step nanosleep(Warp& w, const Op&, uint32_t) {
    w.fragment().pc += 1;
    return Step::kYield;
}

Step nothing(Warp&, const Op&, uint32_t) {
    return Step::kNext;
}

void decode_control(Decoder& d) {
    d.op.op_class = OpClass::kControl;
    d.op.dataflow = Dataflow::kRequire;
    const std::string& opcode = d.in().opcode;
    if (opcode == "bra") {
        d.take("uni");
        d.need_operands(1, 1);
        d.op.run = branch;
        d.op.control = true;
    } else if (opcode == "exit" || opcode == "ret") {
        d.take("uni");
        d.need_operands(0, 0);
        d.op.run = exit_op;
        d.op.control = true;
    } else {
        d.op.run = trap_op;  // trap, brkpt
    }
}

void decode_call(Decoder& d) {
    d.fail("device function calls are not supported (inline the function, or build with -DNDEBUG)");
}

void decode_nanosleep(Decoder& d) {
    d.op.op_class = OpClass::kControl;
    d.take_type();
    d.need_operands(1, 1);
    d.op.a = d.src(d.operand(0), Type::kU32);
    d.op.run = nanosleep;
}

// Where the grids before this one have ended already, only here does the warp learn of it (grid_chain.h).
Step wait_for_earlier(Warp& w, const Op&, uint32_t) {
    Launch& launch = *w.cta->cluster->launch;
    Wait& wait = w.fragment().wait;
    wait = Wait{};
    if (!launch.earlier_complete()) {
        wait.kind = WaitKind::kEarlierGrids;
        return Step::kBlocked;
    }
    w.order.grids |= grids_before(launch);
    launch.waited_for_earlier = true;
    return Step::kNext;
}

// Under a seed the CTAs that may now begin can come before whatever follows here.
Step launch_dependents(Warp& w, const Op&, uint32_t) {
    Cluster& cluster = *w.cta->cluster;
    if (w.cta->allows_dependents) {
        return Step::kNext;
    }
    allow_dependents(*w.cta);
    if (!cluster.launch->adversarial) {
        return Step::kNext;
    }
    cluster.gives_way = true;
    w.fragment().pc += 1;
    return Step::kYield;
}

void decode_griddepcontrol(Decoder& d) {
    d.op.op_class = OpClass::kControl;
    const bool waits = d.take_any({"launch_dependents", "wait"}) == "wait";
    d.op.run = waits ? wait_for_earlier : launch_dependents;
    d.program().launches_dependents = d.program().launches_dependents || !waits;
}

// Hints to caches.
void decode_prefetch(Decoder& d) {
    d.op.op_class = OpClass::kOther;
    d.take_space();
    d.take_any({"L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal"});
    d.take_type_if_any();
    d.need_operands(1, 2);
    bool wide = false;
    d.op.a = d.address(d.operand(0), &wide);
    d.op.run = nothing;
}

}  // namespace

Op make_join_point(int line) {
    Op op;
    op.run = join_point;
    op.op_class = OpClass::kControl;
    op.line = line;
    return op;
}

Op make_exit(int line) {
    Op op;
    op.run = exit_op;
    op.op_class = OpClass::kControl;
    op.control = true;
    op.line = line;
    return op;
}

Step exit_lanes(Warp& w, uint32_t mask) {
    Fragment& f = w.fragment();
    w.alive &= ~mask;
    const int join = f.join;
    for (int j = join; j >= 0; j = w.joins[static_cast<size_t>(j)].parent) {
        w.joins[static_cast<size_t>(j)].pending &= ~mask;
    }
    f.mask &= ~mask;
    f.pc += 1;
    if (f.mask != 0) {
        return Step::kJump;
    }
    drop_current(w);
    settle_join(w, join);
    if (w.alive == 0) {
        on_warp_exit(w);
    }
    return Step::kJump;
}

void register_control(DecodeTable& table) {
    for (const char* name : {"bra", "exit", "ret", "trap", "brkpt"}) {
        table[name] = decode_control;
    }
    table["call"] = decode_call;
    table["nanosleep"] = decode_nanosleep;
    table["griddepcontrol"] = decode_griddepcontrol;
    for (const char* name : {"prefetch", "prefetchu", "discard", "applypriority"}) {
        table[name] = decode_prefetch;
    }
}

}  // namespace sim
