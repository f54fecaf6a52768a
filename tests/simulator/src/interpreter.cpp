#include "interpreter.h"

#include "register_checker.h"
#include "wgmma.h"

namespace sim {
namespace {

template <bool kChecked>
uint32_t run(Warp& w, uint32_t budget) {
    const Op* ops = w.program->ops.data();
    uint32_t executed = 0;
    while (executed < budget && w.alive != 0) {
        Fragment& fragment = w.fragment();
        uint32_t pc = fragment.pc;
        const uint32_t mask = fragment.mask;
        Step step = Step::kNext;
        while (executed < budget) {
            const Op& op = ops[pc];
            fragment.pc = pc;
            uint32_t active = mask;
            if (op.guard != kNone) {
                if (kChecked) {
                    check_guard(w, op, mask);
                }
                active &= predicate(w, op.guard);
            }
            ++executed;
            ++w.executed;
            ++w.time;
            ++w.counts[static_cast<size_t>(op.op_class)];
            if (active == 0 && !op.control) {
                ++pc;
                continue;
            }
            if (kChecked && op.dataflow != Dataflow::kOwn) {
                check_registers_before(w, op, active);
            }
            if (w.any_in_flight && op.dataflow == Dataflow::kCopy && copy_in_flight(w, op, active)) {
                ++pc;
                continue;
            }
            step = op.run(w, op, active);
            if (step != Step::kNext) {
                break;
            }
            ++pc;
        }
        if (step == Step::kNext) {
            fragment.pc = pc;
            return executed;
        }
        if (step == Step::kBlocked) {  // it will run again: count it then
            --w.counts[static_cast<size_t>(ops[w.fragment().pc].op_class)];
            --w.executed;
        }
        if (step != Step::kJump) {
            return executed;
        }
    }
    return executed;
}

}  // namespace

uint32_t run_warp(Warp& w, uint32_t budget, bool check_registers) {
    return check_registers ? run<true>(w, budget) : run<false>(w, budget);
}

}  // namespace sim
