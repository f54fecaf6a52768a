// Turns one instruction of the AST into an Op. Each family registers its opcodes in a table.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "errors.h"
#include "program.h"

namespace sim {

uint32_t bytes_of(Type type);
bool is_signed(Type type);
Type parse_type(const std::string& name);

// Where symbols live once a module is loaded.
struct SymbolAddress {
    Space space = Space::kGlobal;
    uint64_t address = 0;  // host address, shared offset, parameter offset or local offset
};
using SymbolTable = std::unordered_map<std::string, SymbolAddress>;

// Virtual register -> byte offset (or predicate index).
using RegisterLayout = std::vector<uint32_t>;

class Decoder {
  public:
    Decoder(Kernel& kernel, const SymbolTable& symbols, const RegisterLayout& layout)
        : kernel_(kernel), program_(kernel.program), symbols_(symbols), layout_(layout) {}

    // Decodes the instruction `in`; appends one Op, or two when an operand needs its own move.
    void decode(const InstructionAst& in);

    // --- for the families ---
    Op op;
    const InstructionAst& in() const { return *in_; }
    Program& program() { return program_; }
    Kernel& kernel() { return kernel_; }

    bool take(const std::string& mod);  // consume a modifier if present
    std::string take_any(std::initializer_list<const char*> mods, const char* otherwise = nullptr);
    Type take_type();  // the next unconsumed type modifier
    Type take_type_if_any();
    bool take_prefix(const std::string& prefix, std::string* rest);
    Space take_space(Space otherwise = Space::kGeneric);

    size_t operand_count() const { return in_->operands.size(); }
    void need_operands(size_t least, size_t most);
    const Operand& operand(size_t index) const;

    Ref dest(const Operand& operand, uint32_t bytes, bool may_be_wider = false);
    Ref src(const Operand& operand, Type type, bool may_be_wider = false);
    Ref constant(uint64_t bits, uint32_t bytes);
    PredRef pred_dest(const Operand& operand);
    PredRef pred_src(const Operand& operand);
    uint64_t integer(const Operand& operand);         // an immediate
    uint32_t width_of(const Operand& operand) const;  // bytes of the register, 0 if it is none
    // [register + offset] into op.*: the register (32 or 64 bits, or a constant) and op.imm.
    Ref address(const Operand& operand, bool* wide);
    uint32_t list(const std::vector<Ref>& refs);
    Ref scratch();
    void emit(const Op& extra) { before_.push_back(extra); }  // runs before this instruction
    const SymbolAddress* find_symbol(const std::string& name) const;
    Ref symbol_value(const Operand& operand, uint32_t bytes);
    Ref special_value(const Operand& operand, uint32_t bytes);

    [[noreturn]] void fail(const std::string& message) const;

  private:
    void check_all_taken() const;
    void fill_dataflow();

    Kernel& kernel_;
    Program& program_;
    const SymbolTable& symbols_;
    const RegisterLayout& layout_;
    const InstructionAst* in_ = nullptr;
    std::vector<bool> taken_;
    std::vector<Op> before_;
    std::vector<uint32_t> read_slots_, written_slots_, read_preds_, written_preds_;
    std::map<std::pair<uint64_t, uint32_t>, Ref> constants_;
    uint32_t scratch_used_ = 0;
};

using DecodeFunction = void (*)(Decoder&);
using DecodeTable = std::unordered_map<std::string, DecodeFunction>;

void register_multiply(DecodeTable& table);
void register_logic(DecodeTable& table);
void register_bits(DecodeTable& table);
void register_float(DecodeTable& table);
void register_moves(DecodeTable& table);
void register_compare(DecodeTable& table);
void register_convert(DecodeTable& table);
void register_memory(DecodeTable& table);
void register_atomics(DecodeTable& table);
void register_async_store(DecodeTable& table);
void register_control(DecodeTable& table);
void register_warp_ops(DecodeTable& table);
void register_matrix_moves(DecodeTable& table);
void register_barriers(DecodeTable& table);
void register_mbarrier(DecodeTable& table);
void register_cp_async(DecodeTable& table);
void register_bulk_copy(DecodeTable& table);
void register_wgmma(DecodeTable& table);
void register_mma_sync(DecodeTable& table);
void register_fences(DecodeTable& table);

// Special registers: emits the move of `name` into a register of `bytes`.
Handler special_register_handler(const std::string& name, uint32_t bytes, int64_t* code);

// Decodes the whole kernel: control flow, register layout, instructions.
void decode_kernel(Kernel& kernel, const SymbolTable& symbols);

}  // namespace sim
