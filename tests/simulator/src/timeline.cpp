#include "timeline.h"

#include <algorithm>

#include "errors.h"
#include "launch.h"
#include "scheduler.h"

namespace sim {
namespace {

constexpr uint64_t kMultiplyAddsPerCycle = 2048;  // of 16 bits, one SM

bool recording(const Cluster& cluster) {
    return cluster.launch->config.timeline;
}

void push(Cluster& cluster, const Cta& cta, uint32_t warp, TimelineEvent event) {
    event.cta = cluster.number * cluster.ctas.size() + cta.rank;
    event.warp = warp;
    cluster.timeline.push_back(std::move(event));
}

std::string at_line(int line) {
    return format("\"line\": %d", line);
}

}  // namespace

void begin_run(Warp& w) {
    if (recording(*w.cta->cluster)) {
        w.run_start = {w.time, w.counts};
    }
}

void end_run(Warp& w) {
    if (!recording(*w.cta->cluster) || w.time == w.run_start.time) {
        return;
    }
    std::string details;
    for (size_t i = 0; i < w.counts.size(); ++i) {
        const uint64_t count = w.counts[i] - w.run_start.counts[i];
        if (count != 0) {
            details += format("%s\"%s\": %llu", details.empty() ? "" : ", ", name_of(static_cast<OpClass>(i)),
                              static_cast<unsigned long long>(count));
        }
    }
    push(*w.cta->cluster, *w.cta, w.index, {"run", "run", w.run_start.time, w.time, 0, 0, details});
}

void wait_until(Warp& w, uint64_t until, const char* what, uint32_t number, int line) {
    if (until <= w.time) {
        return;
    }
    Cluster& cluster = *w.cta->cluster;
    if (recording(cluster)) {
        end_run(w);
        push(cluster, *w.cta, w.index,
             {what, "wait", w.time, until, 0, 0, format("\"number\": %u, ", number) + at_line(line)});
    }
    w.time = until;
    begin_run(w);
}

void occupy_tensor_cores(Warp& w, const WgmmaShape& shape, WgmmaItem& item) {
    if (item.end != 0) {  // by another warp of the warpgroup: a product is one for the four
        return;
    }
    const uint64_t bytes = shape.k == 0 ? 2 : 32 / static_cast<uint64_t>(shape.k);
    const uint64_t multiply_adds =
        uint64_t{64} * static_cast<uint64_t>(shape.n) * static_cast<uint64_t>(shape.k);
    item.begin = std::max(w.time, w.cta->tensor_cores_busy_until);
    item.end = item.begin + std::max<uint64_t>(1, multiply_adds * bytes / (2 * kMultiplyAddsPerCycle));
    w.cta->tensor_cores_busy_until = item.end;
    Cluster& cluster = *w.cta->cluster;
    if (recording(cluster)) {
        const uint32_t first_warp = w.index / 4 * 4;
        push(cluster, *w.cta, first_warp,
             {shape.name + (shape.a_in_registers ? ", A in registers" : ""), "tensor", item.begin, item.end,
              0, 0, at_line(item.op->line)});
    }
}

void record_engine(Cluster& cluster, const AsyncItem& item) {
    if (!recording(cluster) || item.cta == nullptr) {
        return;
    }
    uint64_t now = item.issue_time;  // its end, where nobody's clock says more
    for (const Warp& w : item.cta->warps) {
        now = std::max(now, completes_at_issue(cluster) ? 0 : w.time);
    }
    push(cluster, *item.cta, item.warp_index,
         {item.describe(), "engine", item.issue_time, now, 0, 0, at_line(item.line)});
}

std::string timeline_json(const std::vector<TimelineEvent>& events) {
    std::string text = "{\"traceEvents\": [";
    bool first = true;
    for (const TimelineEvent& event : events) {
        text += first ? "\n" : ",\n";
        first = false;
        text += format(
            "{\"name\": \"%s\", \"cat\": \"%s\", \"ph\": \"X\", \"ts\": %llu, \"dur\": %llu, \"pid\": %llu, "
            "\"tid\": %u, \"args\": {%s}}",
            event.name.c_str(), event.category, static_cast<unsigned long long>(event.begin),
            static_cast<unsigned long long>(event.end - event.begin),
            static_cast<unsigned long long>(event.cta), event.warp, event.details.c_str());
    }
    return text +
           "\n], \"displayTimeUnit\": \"ns\", \"unit\": \"warp instructions of a warp, a logical time\"}\n";
}

}  // namespace sim
