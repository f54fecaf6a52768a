// mma.sync on 16-bit floats: D = A * B + C of one warp, A of 16 rows, B of 8 columns, K of 16 or 8. The
// arithmetic is that of wgmma.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "float_formats.h"
#include "lanes.h"
#include "launch.h"
#include "warp_sync.h"
#include "wgmma.h"

namespace sim {
namespace {

constexpr int kRows = 16, kColumns = 8;

float element(uint32_t packed, int half, Type type) {
    const uint16_t code = static_cast<uint16_t>(packed >> (16 * half));
    return type == Type::kF16 ? half_to_float(code) : bf16_to_float(code);
}

// Registers 0 and 1 of a lane hold rows l / 4 and l / 4 + 8 of columns 2 * (l % 4) and the next, registers 2
// and 3 the same 8 columns on.
void load_a(const Warp& w, const WgmmaShape& shape, std::vector<float>& values) {
    values.resize(static_cast<size_t>(shape.k) * 2 * kLanes);
    const uint32_t* registers = w.program->lists.data() + shape.a_registers;
    for (int r = 0; r < shape.k / 4; ++r) {
        const uint32_t* packed = source<uint32_t>(w, registers[r]);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 2; ++i) {
                const int k = r / 2 * 8 + lane % 4 * 2 + i;
                const float value = element(packed[lane], i, shape.a);
                float* quad = values.data() + (r % 2 * shape.k + k) * kLanes + lane / 4 * 4;
                std::fill(quad, quad + 4, value);
            }
        }
    }
}

// Register r of a lane holds column l / 4 of rows 8 * r + 2 * (l % 4) and the next.
void load_b(const Warp& w, const WgmmaShape& shape, const uint32_t* registers, std::vector<float>& values) {
    values.resize(static_cast<size_t>(shape.k) * kLanes);
    for (int r = 0; r < shape.k / 8; ++r) {
        const uint32_t* packed = source<uint32_t>(w, registers[r]);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 2; ++i) {
                const int k = r * 8 + lane % 4 * 2 + i, column = lane / 4;
                const float value = element(packed[lane], i, shape.b);
                for (int quad = 0; quad < 4; ++quad) {
                    values[static_cast<size_t>(k * kLanes + column % 2 * 16 + quad * 4 + column / 2)] = value;
                }
            }
        }
    }
}

// C into D, which may be the same registers in another order.
void copy_accumulators(Warp& w, const WgmmaShape& shape, const uint32_t* from) {
    uint32_t values[4][kLanes];
    for (uint32_t i = 0; i < shape.accumulator_count; ++i) {
        std::memcpy(values[i], source<uint32_t>(w, from[i]), sizeof values[i]);
    }
    const uint32_t* to = w.program->lists.data() + shape.accumulators;
    for (uint32_t i = 0; i < shape.accumulator_count; ++i) {
        std::memcpy(destination<uint32_t>(w, to[i]), values[i], sizeof values[i]);
    }
}

// target: the shape; list: the registers of B, then of C.
Step mma(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    if (op.guard != kNone) {
        lanes &= predicate(w, op.guard);
    }
    if (lanes != kAllLanes) {
        throw SimError(ErrorKind::kDivergence,
                       format("all 32 lanes must execute it, here only 0x%08x (warp %u)", lanes, w.index),
                       op.line);
    }
    const WgmmaShape& shape = w.program->wgmma_shapes[op.target];
    const uint32_t* registers = w.program->lists.data() + op.list;
    WgmmaOperand a, b;
    load_a(w, shape, a.values);
    load_b(w, shape, registers, b.values);
    fill_exponents(a, shape.a);
    fill_exponents(b, shape.b);
    copy_accumulators(w, shape, registers + shape.k / 8);
    multiply(w, shape, true, a, b, w.cta->cluster->launch->config.exact_16bit);
    return Step::kNext;
}

const std::vector<Operand>& registers_of(const Decoder& d, size_t index, uint32_t count) {
    const Operand& operand = d.operand(index);
    if (operand.kind != Operand::kVector || operand.elements.size() != count) {
        d.fail(format("operand %zu is no vector of %u registers", index + 1, count));
    }
    return operand.elements;
}

WgmmaShape take_shape(Decoder& d) {
    WgmmaShape shape;
    shape.n = kColumns;
    shape.k = d.take_any({"m16n8k16", "m16n8k8"}) == "m16n8k16" ? 16 : 8;
    const std::vector<std::string>& mods = d.in().mods;
    if (std::find(mods.begin(), mods.end(), d.take_any({"row"})) >
        std::find(mods.begin(), mods.end(), d.take_any({"col"}))) {
        d.fail("A is .row and B is .col");
    }
    shape.d = d.take_type();
    shape.a = d.take_type();
    shape.b = d.take_type();
    const Type c = d.take_type();
    const bool to_f32 = shape.d == Type::kF32 && (shape.a == Type::kF16 || shape.a == Type::kBf16);
    const bool to_f16 = shape.d == Type::kF16 && shape.a == Type::kF16;
    if ((!to_f32 && !to_f16) || shape.b != shape.a || c != shape.d) {
        d.fail("mma.sync is modelled for .f16 and .bf16 with .f32, and .f16 with .f16 accumulators");
    }
    shape.a_in_registers = true;
    shape.accumulator_count = shape.d == Type::kF32 ? 4 : 2;
    return shape;
}

void decode_mma(Decoder& d) {
    d.op.op_class = OpClass::kOther;
    d.op.dataflow = Dataflow::kRequire;
    d.take_any({"sync"});
    d.take_any({"aligned"});
    WgmmaShape shape = take_shape(d);
    d.need_operands(4, 4);
    std::vector<Ref> a, others, result;
    for (const Operand& one : registers_of(d, 1, static_cast<uint32_t>(shape.k) * kRows / 64)) {
        a.push_back(d.src(one, Type::kB32));
    }
    for (const Operand& one : registers_of(d, 2, static_cast<uint32_t>(shape.k) * kColumns / 64)) {
        others.push_back(d.src(one, Type::kB32));
    }
    for (const Operand& one : registers_of(d, 3, shape.accumulator_count)) {
        others.push_back(d.src(one, Type::kB32));
    }
    for (const Operand& one : registers_of(d, 0, shape.accumulator_count)) {
        result.push_back(d.dest(one, 4));
    }
    shape.a_registers = d.list(a);
    shape.accumulators = d.list(result);
    d.op.list = d.list(others);
    d.op.list_size = static_cast<uint16_t>(others.size());
    d.op.target = static_cast<uint32_t>(d.program().wgmma_shapes.size());
    d.program().wgmma_shapes.push_back(shape);
    d.op.run = mma;
}

}  // namespace

void register_mma_sync(DecodeTable& table) {
    table["mma"] = decode_mma;
}

}  // namespace sim
