// Basic blocks, post-dominators and liveness: what the decoder needs to know of a kernel's shape.
#pragma once

#include <vector>

#include "decoder.h"
#include "ptx_ast.h"

namespace sim {

struct Block {
    int begin = 0, end = 0;       // instructions [begin, end)
    std::vector<int> successors;  // block numbers; the exit is blocks.size()
};

struct ControlFlow {
    std::vector<Block> blocks;
    std::vector<int> block_of;       // per instruction
    std::vector<int> reconvergence;  // per block: first instruction of its post-dominator, -1 none
};

ControlFlow build_control_flow(const KernelAst& kernel);

// Registers an instruction reads and writes.
struct Roles {
    std::vector<int> reads, writes;
};
Roles roles_of(const InstructionAst& instruction);

// Packs virtual registers: offsets in bytes (multiples of 64), or indices for predicates.
RegisterLayout allocate_registers(const KernelAst& kernel, const ControlFlow& flow, uint32_t* register_bytes,
                                  uint32_t* predicate_count);

}  // namespace sim
