#include "wgmma_checks.h"

#include <algorithm>

#include "checker.h"
#include "errors.h"
#include "launch.h"

namespace sim {
namespace {

void check_fenced(const Warp& w, const Op& op, uint32_t slot, const char* what) {
    if (w.written_at[slot] > w.last_wgmma_fence) {
        throw SimError(
            ErrorKind::kWgmma,
            format("%s was written after the last wgmma.fence: wgmma.fence is missing before this wgmma",
                   what),
            op.line);
    }
}

void keep_smaller(Clock& clock, const Clock& other) {
    for (size_t i = 0; i < clock.size(); ++i) {
        clock[i] = std::min(clock[i], clock_at(other, static_cast<uint32_t>(i)));
    }
}

void check_operand(Cta& cta, const Warpgroup& group, const WgmmaItem& item, uint32_t index,
                   const OperandLayout& layout) {
    const OperandChunks pieces = operand_chunks(layout, cta, item.op->line);
    for (const OperandChunk& chunk : *pieces.chunks) {
        check_read({cta.cluster, &cta, pieces.base + chunk.offset, 16, group.agent, index + 1, &item.clock,
                    &item.proxy_clock, item.op->line});
    }
}

}  // namespace

void check_issue(const Warp& w, const Op& op, const WgmmaShape& shape, bool scale_d) {
    const Config& config = w.cta->cluster->launch->config;
    const uint32_t* lists = w.program->lists.data();
    if (config.check_wgmma) {
        if (w.last_wgmma_fence == 0) {
            throw SimError(ErrorKind::kWgmma, "the first wgmma of a warp needs a wgmma.fence before it",
                           op.line);
        }
        for (uint32_t i = 0; i < shape.accumulator_count; ++i) {
            const uint32_t slot = lists[shape.accumulators + i] / 64;
            check_fenced(w, op, slot, "an accumulator register");
            if (w.being_read[slot] != 0) {
                throw SimError(ErrorKind::kWgmma,
                               "an accumulator register is still an operand of a wgmma in flight", op.line);
            }
        }
        for (uint32_t i = 0; shape.a_in_registers && i < 4; ++i) {
            const uint32_t slot = lists[shape.a_registers + i] / 64;
            check_fenced(w, op, slot, "a register operand");
            if (w.in_flight[slot] != 0) {
                throw SimError(
                    ErrorKind::kWgmma,
                    "a register operand is the accumulator of a wgmma that has not been waited for", op.line);
            }
        }
    }
    if (!config.check_uninitialized) {
        return;
    }
    for (uint32_t i = 0; scale_d && i < shape.accumulator_count; ++i) {
        if (w.defined[lists[shape.accumulators + i] / 64] != kAllLanes) {
            throw SimError(ErrorKind::kUninitialized,
                           "the accumulator of a wgmma with scale-d was never written", op.line);
        }
    }
    for (uint32_t i = 0; shape.a_in_registers && i < 4; ++i) {
        if (w.defined[lists[shape.a_registers + i] / 64] != kAllLanes) {
            throw SimError(ErrorKind::kUninitialized, "a register operand of the wgmma was never written",
                           op.line);
        }
    }
}

void mark_in_flight(Warp& w, const WgmmaShape& shape, uint32_t item) {
    const uint32_t* lists = w.program->lists.data();
    for (uint32_t i = 0; i < shape.accumulator_count; ++i) {
        const uint32_t slot = lists[shape.accumulators + i] / 64;
        w.in_flight[slot] = item + 1;
        w.defined[slot] = kAllLanes;
    }
    for (uint32_t i = 0; shape.a_in_registers && i < 4; ++i) {
        w.being_read[lists[shape.a_registers + i] / 64] = item + 1;
    }
    w.any_in_flight = true;
}

void note_issue_clocks(Warp& w, WgmmaItem& item) {
    if (!w.cta->cluster->launch->config.check_races) {
        return;
    }
    if (item.issued == 0) {
        item.clock = w.order.clock;
        item.proxy_clock = w.order.shared_proxy;
    } else {
        keep_smaller(item.clock, w.order.clock);
        keep_smaller(item.proxy_clock, w.order.shared_proxy);
    }
    ++w.order.clock[w.agent];
}

void check_operands(Cta& cta, Warpgroup& group, uint32_t index) {
    WgmmaItem& item = group.items[index];
    const Config& config = cta.cluster->launch->config;
    if (item.checked || !(config.check_races || config.check_uninitialized)) {
        return;
    }
    item.checked = true;
    const WgmmaShape& shape = group.warps[0]->program->wgmma_shapes[item.op->target];
    check_operand(cta, group, item, index,
                  {item.b, shape.n, shape.k, bytes_of(shape.b), shape.transpose_b, "B"});
    if (!shape.a_in_registers) {
        check_operand(cta, group, item, index,
                      {item.a, 64, shape.k, bytes_of(shape.a), shape.transpose_a, "A"});
    }
}

}  // namespace sim
