// ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements, a row per address.
#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "lanes.h"
#include "warp_sync.h"

namespace sim {
namespace {

void row_pointers(Warp& w, const Op& op, int matrices, AccessKind kind, uint8_t** rows) {
    uint64_t addresses[kLanes];
    lane_addresses(w, op, addresses);
    for (int i = 0; i < matrices * 8; ++i) {
        rows[i] = resolve(w, op, addresses[i], 16, kind, i);
    }
}

void require_whole_warp(const Warp& w, const Op& op, uint32_t lanes) {
    if (lanes != kAllLanes) {
        throw SimError(ErrorKind::kDivergence,
                       format("all 32 lanes must execute it, here only 0x%08x (warp %u)", lanes, w.index),
                       op.line);
    }
}

// Lane l holds of each matrix the elements (l / 4, 2 * (l % 4)) and the next; transposed the other way.
uint32_t element_row(int lane, int i, bool transposed) {
    return static_cast<uint32_t>(transposed ? lane % 4 * 2 + i : lane / 4);
}
uint32_t element_column(int lane, int i, bool transposed) {
    return static_cast<uint32_t>(transposed ? lane / 4 : lane % 4 * 2 + i);
}

Step load_matrices(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_whole_warp(w, op, lanes);
    uint8_t* rows[kLanes];
    row_pointers(w, op, op.list_size, AccessKind::kRead, rows);
    const bool transposed = op.code != 0;
    for (int m = 0; m < op.list_size; ++m) {
        uint32_t result[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                std::memcpy(&pair[i],
                            rows[static_cast<uint32_t>(m) * 8 + element_row(lane, i, transposed)] +
                                element_column(lane, i, transposed) * 2,
                            2);
            }
            result[lane] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
        }
        std::memcpy(destination<uint32_t>(w, w.program->lists[op.list + static_cast<uint32_t>(m)]), result,
                    sizeof result);
    }
    count_wavefronts(w, op, rows, op.list_size * 8u, 16);
    count_bytes(*w.cta->cluster, BytePath::kSharedLoad, uint64_t{op.list_size} * 128);
    return Step::kNext;
}

Step store_matrices(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_whole_warp(w, op, lanes);
    uint8_t* rows[kLanes];
    row_pointers(w, op, op.list_size, AccessKind::kWrite, rows);
    const bool transposed = op.code != 0;
    for (int m = 0; m < op.list_size; ++m) {
        const uint32_t* values = source<uint32_t>(w, w.program->lists[op.list + static_cast<uint32_t>(m)]);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 2; ++i) {
                const uint16_t element = static_cast<uint16_t>(values[lane] >> (16 * i));
                std::memcpy(rows[static_cast<uint32_t>(m) * 8 + element_row(lane, i, transposed)] +
                                element_column(lane, i, transposed) * 2,
                            &element, 2);
            }
        }
    }
    count_wavefronts(w, op, rows, op.list_size * 8u, 16);
    count_bytes(*w.cta->cluster, BytePath::kSharedStore, uint64_t{op.list_size} * 128);
    ++w.cta->cluster->progress;
    return Step::kNext;
}

Step transpose_matrix(Warp& w, const Op& op, uint32_t) {
    uint32_t lanes = 0;
    if (!meet_all(w, op, &lanes)) {
        return Step::kBlocked;
    }
    require_whole_warp(w, op, lanes);
    const uint32_t* values = source<uint32_t>(w, op.a);
    uint32_t result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t packed = 0;
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = element_row(lane, i, true), column = element_column(lane, i, true);
            packed |= (values[row * 4 + column / 2] >> (column % 2 * 16) & 0xffffu) << (16 * i);
        }
        result[lane] = packed;
    }
    std::memcpy(destination<uint32_t>(w, op.d), result, sizeof result);
    return Step::kNext;
}

void decode_matrix_move(Decoder& d) {
    d.op.op_class = OpClass::kMatrixMove;
    d.op.dataflow = Dataflow::kRequire;
    const bool is_load = d.in().opcode == "ldmatrix";
    d.take_any({"sync"});
    d.take_any({"aligned"});
    d.take_any({"m8n8"});
    const std::string count = d.take_any({"x1", "x2", "x4"});
    d.op.code = d.take("trans");
    d.op.space = d.take_space();
    d.take_any({"b16"});
    d.need_operands(2, 2);
    const Operand& registers = d.operand(is_load ? 0 : 1);
    const std::vector<Operand> elements =
        registers.kind == Operand::kVector ? registers.elements : std::vector<Operand>{registers};
    if (elements.size() != static_cast<size_t>(count[1] - '0')) {
        d.fail("the number of registers does not match ." + count);
    }
    std::vector<Ref> refs;
    for (const Operand& element : elements) {
        refs.push_back(is_load ? d.dest(element, 4) : d.src(element, Type::kB32));
    }
    d.op.list = d.list(refs);
    d.op.list_size = static_cast<uint16_t>(refs.size());
    bool wide = false;
    d.op.a = d.address(d.operand(is_load ? 1 : 0), &wide);
    d.op.target2 = wide;
    d.op.run = is_load ? load_matrices : store_matrices;
}

void decode_movmatrix(Decoder& d) {
    d.op.op_class = OpClass::kMatrixMove;
    d.take_any({"sync"});
    d.take_any({"aligned"});
    d.take_any({"m8n8"});
    d.take_any({"trans"});
    d.take_any({"b16"});
    d.need_operands(2, 2);
    d.op.d = d.dest(d.operand(0), 4);
    d.op.a = d.src(d.operand(1), Type::kB32);
    d.op.run = transpose_matrix;
}

}  // namespace

void register_matrix_moves(DecodeTable& table) {
    table["ldmatrix"] = decode_matrix_move;
    table["stmatrix"] = decode_matrix_move;
    table["movmatrix"] = decode_movmatrix;
}

}  // namespace sim
