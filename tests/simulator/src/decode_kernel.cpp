// One kernel from AST to Program: blocks, register slots, instructions, jump targets.
#include "bulk_copy.h"
#include "control.h"
#include "control_flow.h"
#include "decoder.h"

namespace sim {
namespace {

constexpr uint32_t kScratchBytes = 8 * 256;

std::vector<bool> join_points(const KernelAst& ast, const ControlFlow& flow) {
    std::vector<bool> joins(ast.instructions.size() + 1, false);
    for (size_t b = 0; b < flow.blocks.size(); ++b) {
        const InstructionAst& last = ast.instructions[static_cast<size_t>(flow.blocks[b].end) - 1];
        if (last.guard >= 0 && last.opcode == "bra" && flow.reconvergence[b] >= 0) {
            joins[static_cast<size_t>(flow.reconvergence[b])] = true;
        }
    }
    return joins;
}

}  // namespace

namespace {

// Numbers what may touch global memory; the shadow of global memory knows an instruction by that.
void number_accesses(Program& program) {
    for (Op& op : program.ops) {
        const bool writes = op.op_class == OpClass::kStoreGlobal || op.op_class == OpClass::kAtomic ||
                            (op.op_class == OpClass::kTma && is_bulk_store(op));
        const bool reads = op.op_class == OpClass::kLoadGlobal || op.op_class == OpClass::kAsyncCopy ||
                           op.op_class == OpClass::kAtomic ||
                           (op.op_class == OpClass::kTma && (!is_bulk_store(op) || is_bulk_reduction(op)));
        const bool strong_shared = op.level != kWeak && (op.op_class == OpClass::kLoadShared ||
                                                         op.op_class == OpClass::kStoreShared);
        if (!writes && !reads && !strong_shared) {
            continue;
        }
        if (program.accesses.size() > 0xffff) {
            throw SimError(ErrorKind::kUnsupported, "more than 65535 accesses of global memory", op.line);
        }
        op.access = static_cast<uint16_t>(program.accesses.size());
        program.accesses.push_back({op.line, writes, reads, op.level});
    }
}

}  // namespace

void decode_kernel(Kernel& kernel, const SymbolTable& symbols) {
    const KernelAst& ast = kernel.ast;
    Program& program = kernel.program;
    if (ast.instructions.empty()) {
        throw SimError(ErrorKind::kParse, "kernel '" + ast.name + "' has no instruction", ast.line);
    }
    const ControlFlow flow = build_control_flow(ast);
    const RegisterLayout layout =
        allocate_registers(ast, flow, &program.register_bytes, &program.predicate_count);
    const std::vector<bool> joins = join_points(ast, flow);
    std::vector<uint32_t> op_of(ast.instructions.size() + 1);

    Decoder decoder(kernel, symbols, layout);
    for (size_t i = 0; i < ast.instructions.size(); ++i) {
        op_of[i] = static_cast<uint32_t>(program.ops.size());
        if (joins[i]) {
            program.ops.push_back(make_join_point(ast.instructions[i].line));
            program.names.push_back("(reconvergence)");
        }
        decoder.decode(ast.instructions[i]);
    }
    op_of[ast.instructions.size()] = static_cast<uint32_t>(program.ops.size());
    program.ops.push_back(make_exit(ast.instructions.back().line));
    program.names.push_back("(end)");

    for (size_t i = 0; i < ast.instructions.size(); ++i) {
        const InstructionAst& in = ast.instructions[i];
        if (in.opcode != "bra") {
            continue;
        }
        // A branch decodes to exactly one Op, the last before the next instruction's first.
        Op& op = program.ops[op_of[i + 1] - 1];
        const int reconvergence = flow.reconvergence[static_cast<size_t>(flow.block_of[i])];
        op.target = op_of[static_cast<size_t>(ast.labels.at(in.operands[0].name))];
        op.target2 = reconvergence < 0 ? kNone : op_of[static_cast<size_t>(reconvergence)];
    }
    program.register_bytes += kScratchBytes;
    number_accesses(program);
}

}  // namespace sim
