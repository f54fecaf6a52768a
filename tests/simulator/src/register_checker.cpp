#include "register_checker.h"

#include "errors.h"
#include "lanes.h"
#include "launch.h"

namespace sim {
namespace {

[[noreturn]] void undefined(const Op& op, uint32_t lanes, const char* what) {
    throw SimError(ErrorKind::kUninitialized,
                   format("%s that lanes 0x%08x never wrote is used here", what, lanes), op.line);
}

// What of the sources is defined, over the active lanes.
uint32_t defined_sources(const Warp& w, const Op& op, uint32_t mask) {
    uint32_t defined = kAllLanes;
    const uint32_t* lists = w.program->lists.data();
    for (uint32_t i = 0; i < op.reads_size; ++i) {
        defined &= w.defined[lists[op.reads + i]];
    }
    if (op.dataflow == Dataflow::kRequire && (mask & ~defined) != 0) {
        undefined(op, mask & ~defined, "a register");
    }
    for (uint32_t i = 0; i < op.pred_reads_size; ++i) {
        defined &= w.pred_defined[lists[op.pred_reads + i]];
    }
    if (op.dataflow == Dataflow::kRequire && (mask & ~defined) != 0) {
        undefined(op, mask & ~defined, "a predicate");
    }
    return defined;
}

[[noreturn]] void touched_in_flight(const Warp& w, const Op& op, uint32_t item, const char* how) {
    const WgmmaItem& wgmma = w.warpgroup->items[item - 1];
    throw SimError(ErrorKind::kWgmma,
                   format("%s before wgmma.wait_group: the wgmma of PTX line %d is still in flight", how,
                          wgmma.op->line),
                   op.line);
}

void check_in_flight(const Warp& w, const Op& op) {
    const uint32_t* lists = w.program->lists.data();
    for (uint32_t i = 0; i < op.reads_size; ++i) {
        const uint32_t item = w.in_flight[lists[op.reads + i]];
        if (item != 0 && op.dataflow != Dataflow::kCopy) {
            touched_in_flight(w, op, item, "an accumulator is read");
        }
    }
    for (uint32_t i = 0; i < op.writes_size; ++i) {
        const uint32_t slot = lists[op.writes + i];
        if (w.in_flight[slot] != 0) {
            touched_in_flight(w, op, w.in_flight[slot], "an accumulator is written");
        }
        if (w.being_read[slot] != 0) {
            touched_in_flight(w, op, w.being_read[slot], "a register operand of a wgmma is overwritten");
        }
    }
}

void mark_written(Warp& w, const Op& op, uint32_t mask, uint32_t defined) {
    const uint32_t* lists = w.program->lists.data();
    // A copy only renames: the fence that covers its source covers it.
    uint64_t when = w.executed;
    if (op.dataflow == Dataflow::kCopy) {
        when = op.reads_size != 0 ? w.written_at[lists[op.reads]] : 0;
    }
    for (uint32_t i = 0; i < op.writes_size; ++i) {
        const uint32_t slot = lists[op.writes + i];
        w.defined[slot] = (w.defined[slot] & ~mask) | (defined & mask);
        w.written_at[slot] = when;
    }
    for (uint32_t i = 0; i < op.pred_writes_size; ++i) {
        uint32_t& slot = w.pred_defined[lists[op.pred_writes + i]];
        slot = (slot & ~mask) | (defined & mask);
    }
}

}  // namespace

void check_guard(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t defined = w.pred_defined[op.guard & ~kNegateBit];
    if ((mask & ~defined) != 0 && w.cta->cluster->launch->config.check_uninitialized) {
        undefined(op, mask & ~defined, "a guard predicate");
    }
}

void check_registers_before(Warp& w, const Op& op, uint32_t mask) {
    const Config& config = w.cta->cluster->launch->config;
    if (w.any_in_flight && config.check_wgmma) {
        check_in_flight(w, op);
    }
    uint32_t defined = kAllLanes;
    if (config.check_uninitialized) {
        defined = defined_sources(w, op, mask);
        if (op.dataflow == Dataflow::kRequire) {
            defined = kAllLanes;  // a load defines its result
        }
    }
    mark_written(w, op, mask, defined);
}

}  // namespace sim
