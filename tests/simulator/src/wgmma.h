// wgmma: asynchronous products of a warpgroup. Issue and waiting in wgmma.cpp, where operands lie in
// shared memory and registers in wgmma_operands.cpp, arithmetic in wgmma_math.cpp.
#pragma once

#include "decoder.h"
#include "machine.h"

namespace sim {

// --- scheduling ---
bool wgmma_issued_by_all(const Warp& warp, uint32_t items);
bool run_one_wgmma(Cluster& cluster);  // one item whose four warps have issued it

// A move of a register that a wgmma still has to write; true when it was taken care of.
bool copy_in_flight(Warp& warp, const Op& op, uint32_t mask);

// --- operands ---
// One 16-byte piece of an operand in shared memory: elements along K (or along M/N when transposed).
struct OperandChunk {
    uint32_t offset;  // from OperandChunks::base
    int mn, k;        // first element
};
struct OperandLayout {
    uint64_t descriptor;
    int rows;  // M or N
    int k;     // elements
    uint32_t element_bytes;
    bool mn_major;
    const char* name;
    int first_row = 0;
};
struct OperandChunks {
    const std::vector<OperandChunk>* chunks;
    uint32_t base;  // from kSharedBase
};
OperandChunks operand_chunks(const OperandLayout& layout, const Cta& cta, int line);

// Values of B as [n / 8][k][n % 2][16]: the four columns of a lane quad, four times.
void load_b(const Cta& cta, const WgmmaShape& shape, uint64_t descriptor, int line,
            std::vector<float>& values);
// Values of the 16 rows of one warp as [half][k][32 lanes].
void load_a_shared(const Cta& cta, const WgmmaShape& shape, uint64_t descriptor, int warp, int line,
                   std::vector<float>& values);
void load_a_registers(const Warp& warp, const WgmmaShape& shape, std::vector<float>& values);

// --- arithmetic ---
// The exponents of an operand's values, which the exact accumulation needs.
void fill_exponents(WgmmaOperand& operand, Type type);
// D = A * B (+ D), in the registers of one warp.
void multiply(Warp& warp, const WgmmaShape& shape, bool scale_d, const WgmmaOperand& a, const WgmmaOperand& b,
              bool exact);

}  // namespace sim
