// Issue of wgmma, its groups, and when the products happen.
//
// A wgmma belongs to the four warps of a warpgroup. With the early policy a warp's rows are computed
// where the warp issues it; otherwise the whole item waits in the warpgroup's queue until somebody
// waits for it or the schedule picks it, and reads shared memory and registers only then.
#include "wgmma.h"

#include <algorithm>

#include "checker.h"
#include "lanes.h"
#include "launch.h"
#include "scheduler.h"
#include "warp_sync.h"
#include "wgmma_checks.h"

namespace sim {
namespace {

constexpr uint32_t kAllWarps = 0xf;

const WgmmaShape& shape_of(const Warp& w, const WgmmaItem& item) {
    return w.program->wgmma_shapes[item.op->target];
}

uint32_t warp_in_group(const Warp& w) {
    return w.index % 4;
}

void require_warpgroup(const Warp& w, const Op& op) {
    if (w.warpgroup == nullptr || w.alive != kAllLanes) {
        throw SimError(ErrorKind::kWgmma, "wgmma needs a whole warpgroup: four warps of 32 threads", op.line);
    }
}

void compute_rows(Warp& w, uint32_t item_index) {
    Warpgroup& group = *w.warpgroup;
    WgmmaItem& item = group.items[item_index];
    const WgmmaShape& shape = shape_of(w, item);
    const Cta& cta = *w.cta;
    const Config& config = cta.cluster->launch->config;
    const bool exact = bytes_of(shape.a) == 1 ? config.exact_8bit : config.exact_16bit;
    if (group.decoded_item != item_index) {
        load_b(cta, shape, item.b, item.op->line, group.b.values);
        if (exact) {
            fill_exponents(group.b, shape.b);
        }
        group.decoded_item = item_index;
    }
    if (shape.a_in_registers) {
        load_a_registers(w, shape, group.a.values);
    } else {
        load_a_shared(cta, shape, item.a, static_cast<int>(warp_in_group(w)), item.op->line, group.a.values);
    }
    if (exact) {
        fill_exponents(group.a, shape.a);
    }
    multiply(w, shape, item.scale_d, group.a, group.b, exact);
    item.done |= 1u << warp_in_group(w);
}

void copy_register(Warp& w, const WgmmaStep& step) {
    if (step.bytes == 4) {
        merge(destination<uint32_t>(w, step.to), source<uint32_t>(w, step.from), step.mask);
    } else if (step.bytes == 8) {
        merge(destination<uint64_t>(w, step.to), source<uint64_t>(w, step.from), step.mask);
    } else {
        merge(destination<uint16_t>(w, step.to), source<uint16_t>(w, step.from), step.mask);
    }
}

// The warp's queue up to and with the item, and the moves right behind it.
void run_steps(Warp& w, uint32_t item_index) {
    while (w.wgmma_steps_done < w.wgmma_steps.size()) {
        const WgmmaStep step = w.wgmma_steps[w.wgmma_steps_done];
        if (!step.is_copy && step.item > item_index) {
            break;
        }
        if (step.is_copy) {
            copy_register(w, step);
        } else {
            compute_rows(w, step.item);
        }
        ++w.wgmma_steps_done;
    }
    if (w.wgmma_steps_done == w.wgmma_steps.size()) {
        w.wgmma_steps.clear();
        w.wgmma_steps_done = 0;
    }
}

void run_item(Warpgroup& group, uint32_t index) {
    WgmmaItem& item = group.items[index];
    check_operands(*group.warps[0]->cta, group, index);
    for (Warp* w : group.warps) {
        if ((item.done & (1u << warp_in_group(*w))) == 0) {
            run_steps(*w, index);
        }
    }
}

void run_until(Warpgroup& group, uint32_t items) {
    while (group.first_open < items) {
        run_item(group, group.first_open);
        group.items[group.first_open].clock = Clock();
        group.items[group.first_open].proxy_clock = Clock();
        ++group.first_open;
    }
}

WgmmaItem& join_item(Warp& w, const Op& op, uint64_t a, uint64_t b, bool scale_d) {
    Warpgroup& group = *w.warpgroup;
    const uint32_t index = w.wgmma_issued++;
    if (index == group.items.size()) {
        WgmmaItem fresh;
        fresh.op = &op;
        fresh.a = a;
        fresh.b = b;
        fresh.scale_d = scale_d;
        group.items.push_back(std::move(fresh));
    }
    WgmmaItem& item = group.items[index];
    if (item.op != &op || item.a != a || item.b != b || item.scale_d != scale_d) {
        throw SimError(
            ErrorKind::kWgmma,
            format("the warps of a warpgroup issue different wgmma: warp %u has PTX line %d, descriptors "
                   "0x%llx 0x%llx, another warp line %d, 0x%llx 0x%llx",
                   w.index, op.line, static_cast<unsigned long long>(a), static_cast<unsigned long long>(b),
                   item.op->line, static_cast<unsigned long long>(item.a),
                   static_cast<unsigned long long>(item.b)),
            op.line);
    }
    return item;
}

uint64_t uniform_descriptor(const Warp& w, const Op& op, Ref ref, const char* name) {
    const uint64_t* values = source<uint64_t>(w, ref);
    for (int i = 1; i < kLanes; ++i) {
        if (values[i] != values[0]) {
            throw SimError(ErrorKind::kWgmma,
                           format("the matrix descriptor of %s differs between lanes", name), op.line);
        }
    }
    return values[0];
}

bool uniform_scale(const Warp& w, const Op& op) {
    const uint32_t scale = predicate(w, op.p);
    if (scale != 0 && scale != kAllLanes) {
        throw SimError(ErrorKind::kWgmma, "scale-d differs between the lanes of a warp", op.line);
    }
    return scale != 0;
}

Step issue(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_warpgroup(w, op);
    Cluster& cluster = *w.cta->cluster;
    const WgmmaShape& shape = w.program->wgmma_shapes[op.target];
    const uint64_t a = shape.a_in_registers ? 0 : uniform_descriptor(w, op, op.a, "A");
    const uint64_t b = uniform_descriptor(w, op, op.b, "B");
    const bool scale_d = uniform_scale(w, op);
    check_issue(w, op, shape, scale_d);
    WgmmaItem& item = join_item(w, op, a, b, scale_d);
    const uint32_t index = w.wgmma_issued - 1;
    occupy_tensor_cores(w, shape, item);
    mark_in_flight(w, shape, index);
    note_issue_clocks(w, item);
    item.issued |= 1u << warp_in_group(w);
    WgmmaStep step;
    step.item = index;
    w.wgmma_steps.push_back(step);
    if (warp_in_group(w) == 0) {
        ++cluster.wgmma_counts[shape.name];
        count_operands(w, op, shape);
    }
    ++cluster.progress;
    if (completes_at_issue(cluster)) {
        run_steps(w, index);
        if (item.issued == kAllWarps) {
            run_until(*w.warpgroup, index + 1);
        }
    }
    return Step::kNext;
}

Step fence(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_warpgroup(w, op);
    w.last_wgmma_fence = w.executed;
    return Step::kNext;
}

Step commit_group(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_warpgroup(w, op);
    w.group_ends.push_back(w.wgmma_issued);
    return Step::kNext;
}

void retire(Warp& w, uint32_t items) {
    if (w.cta->cluster->launch->config.check_races) {
        set_clock(w.order.clock, w.warpgroup->agent, items);
    }
    w.any_in_flight = false;
    for (size_t slot = 0; slot < w.in_flight.size(); ++slot) {
        uint32_t& writer = w.in_flight[slot];
        uint32_t& reader = w.being_read[slot];
        writer = writer <= items ? 0 : writer;
        reader = reader <= items ? 0 : reader;
        w.any_in_flight = w.any_in_flight || writer != 0 || reader != 0;
    }
}

// The product is one for the warpgroup, so a warp waits until the others have issued theirs as well.
Step wait_group(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_warpgroup(w, op);
    const size_t allowed = static_cast<size_t>(op.imm);
    const size_t groups = w.group_ends.size();
    const uint32_t items = groups > allowed ? w.group_ends[groups - 1 - allowed] : 0;
    if (!wgmma_issued_by_all(w, items)) {
        Wait& wait = w.fragment().wait;
        wait = Wait{};
        wait.kind = WaitKind::kWgmma;
        wait.phase = items;
        return Step::kBlocked;
    }
    w.fragment().wait = Wait{};
    if (items != 0) {
        wait_until(w, w.warpgroup->items[items - 1].end, "wgmma", items - 1, op.line);
    }
    run_until(*w.warpgroup, items);
    ++w.cta->cluster->progress;
    retire(w, items);
    return Step::kNext;
}

int shape_number(Decoder& d, const std::string& text, size_t* at, char letter) {
    if (*at >= text.size() || text[*at] != letter) {
        d.fail("bad shape ." + text);
    }
    size_t end = *at + 1;
    int value = 0;
    while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end]))) {
        value = value * 10 + (text[end++] - '0');
    }
    *at = end;
    return value;
}

void decode_shape(Decoder& d, WgmmaShape& shape) {
    std::string text;
    if (!d.take_prefix("m64n", &text)) {
        d.fail("expected a shape .m64nNkK");
    }
    text = "n" + text;
    size_t at = 0;
    shape.n = shape_number(d, text, &at, 'n');
    shape.k = shape_number(d, text, &at, 'k');
    shape.d = d.take_type();
    shape.a = d.take_type();
    shape.b = d.take_type();
    shape.name = "m64" + text;
    for (const Type type : {shape.d, shape.a, shape.b}) {
        const char* name = type == Type::kF32    ? "f32"
                           : type == Type::kF16  ? "f16"
                           : type == Type::kBf16 ? "bf16"
                           : type == Type::kTf32 ? "tf32"
                           : type == Type::kE4m3 ? "e4m3"
                           : type == Type::kE5m2 ? "e5m2"
                                                 : "?";
        shape.name += std::string(".") + name;
    }
}

void check_shape(Decoder& d, const WgmmaShape& shape) {
    const auto is_eight = [](Type t) { return t == Type::kE4m3 || t == Type::kE5m2; };
    const bool eight = is_eight(shape.a) && is_eight(shape.b);
    const bool same =
        shape.a == shape.b && (shape.a == Type::kF16 || shape.a == Type::kBf16 || shape.a == Type::kTf32);
    if (!eight && !same) {
        d.fail("this pair of operand types is not supported");
    }
    const int k = static_cast<int>(32 / bytes_of(shape.a));
    if (shape.n < 8 || shape.n > 256 || shape.n % 8 != 0 || shape.k != k) {
        d.fail(format("no such shape: n must be a multiple of 8 in 8..256 and k %d", k));
    }
    const bool half_result = shape.d == Type::kF16 && (eight || shape.a == Type::kF16);
    if (shape.d != Type::kF32 && !half_result) {
        d.fail("this accumulator type is not supported");
    }
}

bool take_sign(Decoder& d, size_t index) {
    const int64_t value = static_cast<int64_t>(d.integer(d.operand(index)));
    if (value != 1 && value != -1) {
        d.fail("imm-scale must be 1 or -1");
    }
    return value < 0;
}

bool take_transpose(Decoder& d, size_t index) {
    const uint64_t value = d.integer(d.operand(index));
    if (value > 1) {
        d.fail("imm-trans must be 0 or 1");
    }
    return value == 1;
}

void decode_mma(Decoder& d) {
    WgmmaShape shape;
    d.take_any({"sync"});
    d.take_any({"aligned"});
    decode_shape(d, shape);
    check_shape(d, shape);
    shape.a_in_registers = d.operand(1).kind == Operand::kVector;
    const bool sixteen = shape.a == Type::kF16 || shape.a == Type::kBf16;
    const size_t transposes = !sixteen ? 0 : shape.a_in_registers ? 1 : 2;
    d.need_operands(6 + transposes, 6 + transposes);
    const Operand& acc = d.operand(0);
    const size_t expected = static_cast<size_t>(shape.d == Type::kF32 ? shape.n / 2 : shape.n / 4);
    if (acc.kind != Operand::kVector || acc.elements.size() != expected) {
        d.fail(format("the accumulator needs %zu registers", expected));
    }
    std::vector<Ref> refs;
    for (const Operand& element : acc.elements) {
        refs.push_back(d.dest(element, 4));
    }
    shape.accumulators = d.list(refs);
    shape.accumulator_count = static_cast<uint32_t>(expected);
    if (shape.a_in_registers) {
        std::vector<Ref> a;
        for (const Operand& element : d.operand(1).elements) {
            a.push_back(d.src(element, Type::kB32));
        }
        if (a.size() != 4) {
            d.fail("operand A in registers takes 4 of them");
        }
        shape.a_registers = d.list(a);
    } else {
        d.op.a = d.src(d.operand(1), Type::kB64);
    }
    d.op.b = d.src(d.operand(2), Type::kB64);
    d.op.p = d.pred_src(d.operand(3));
    shape.negate_a = take_sign(d, 4);
    shape.negate_b = take_sign(d, 5);
    if (transposes == 2) {
        shape.transpose_a = take_transpose(d, 6);
    }
    if (transposes != 0) {
        shape.transpose_b = take_transpose(d, 5 + transposes);
    }
    d.op.target = static_cast<uint32_t>(d.program().wgmma_shapes.size());
    d.program().wgmma_shapes.push_back(shape);
    d.op.run = issue;
}

void decode_wgmma(Decoder& d) {
    d.op.op_class = OpClass::kWgmma;
    d.op.dataflow = Dataflow::kOwn;
    if (d.take("mma_async")) {
        decode_mma(d);
        return;
    }
    const std::string kind = d.take_any({"fence", "commit_group", "wait_group"});
    d.take_any({"sync"});
    d.take_any({"aligned"});
    if (kind == "wait_group") {
        d.need_operands(1, 1);
        d.op.imm = static_cast<int64_t>(d.integer(d.operand(0)));
    } else {
        d.need_operands(0, 0);
    }
    d.op.run = kind == "fence" ? fence : kind == "commit_group" ? commit_group : wait_group;
}

}  // namespace

bool wgmma_issued_by_all(const Warp& w, uint32_t items) {
    for (const Warp* other : w.warpgroup->warps) {
        if (other->wgmma_issued < items) {
            return false;
        }
    }
    return true;
}

bool run_one_wgmma(Cluster& cluster) {
    std::vector<Warpgroup*> candidates;
    for (auto& cta : cluster.ctas) {
        for (auto& group : cta->warpgroups) {
            const bool open = group->first_open < group->items.size();
            if (open && group->items[group->first_open].issued == kAllWarps) {
                candidates.push_back(group.get());
            }
        }
    }
    if (candidates.empty()) {
        return false;
    }
    Warpgroup& chosen = *candidates[cluster.random() % candidates.size()];
    cluster.running = chosen.warps[0];
    run_until(chosen, chosen.first_open + 1);
    cluster.running = nullptr;
    return true;
}

bool copy_in_flight(Warp& w, const Op& op, uint32_t mask) {
    if ((op.a & kConstantBit) != 0 || w.in_flight[op.a / 64] == 0) {
        return false;
    }
    w.in_flight[op.d / 64] = w.in_flight[op.a / 64];
    WgmmaStep step;
    step.is_copy = true;
    step.from = op.a;
    step.to = op.d;
    step.bytes = op.code;
    step.mask = mask;
    if (w.wgmma_steps.empty()) {
        copy_register(w, step);
    } else {
        w.wgmma_steps.push_back(step);
    }
    return true;
}

void register_wgmma(DecodeTable& table) {
    table["wgmma"] = decode_wgmma;
}

}  // namespace sim
