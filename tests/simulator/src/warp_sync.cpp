#include "warp_sync.h"

#include "checker.h"
#include "lanes.h"

namespace sim {
namespace {

bool same_place(const Warp& w, const Fragment& a, const Fragment& b) {
    const Op& x = w.program->ops[a.pc];
    const Op& y = w.program->ops[b.pc];
    return a.pc == b.pc || (x.run == y.run && x.code == 0xbeef && y.code == 0xbeef);  // bar.warp.sync
}

uint32_t gathered(const Warp& w, const Fragment& fragment) {
    uint32_t lanes = fragment.mask;
    for (const Fragment& other : w.fragments) {
        if (other.wait.kind == WaitKind::kWarpSync && same_place(w, fragment, other)) {
            lanes |= other.mask;
        }
    }
    return lanes;
}

}  // namespace

bool can_meet(const Warp& w, const Fragment& fragment) {
    return (fragment.wait.member_mask & w.alive & ~gathered(w, fragment)) == 0;
}

bool meet(Warp& w, const Op&, uint32_t members, uint32_t* joint) {
    Fragment& fragment = w.fragment();
    const uint32_t needed = members & w.alive;
    if ((needed & ~fragment.mask) == 0) {
        fragment.wait.kind = WaitKind::kNone;
        *joint = fragment.mask;
        meet_in_time(w);
        return true;
    }
    *joint = gathered(w, fragment);
    if ((needed & ~*joint) != 0) {
        fragment.wait = Wait{};
        fragment.wait.kind = WaitKind::kWarpSync;
        fragment.wait.member_mask = members;
        return false;
    }
    for (Fragment& other : w.fragments) {
        if (&other != &fragment && other.wait.kind == WaitKind::kWarpSync && same_place(w, fragment, other)) {
            other.pc += 1;
            other.wait = Wait{};
        }
    }
    fragment.wait = Wait{};
    meet_in_time(w);
    return true;
}

bool meet_all(Warp& w, const Op& op, uint32_t* joint) {
    return meet(w, op, w.alive, joint);
}

}  // namespace sim
