// What the parser hands on: a module of variables and kernels, names resolved, nothing decoded.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace sim {

enum class Space : uint8_t { kGeneric, kGlobal, kConst, kParam, kLocal, kSharedCta, kSharedCluster };

struct Operand {
    enum Kind { kRegister, kInteger, kFloat, kSymbol, kVector, kAddress, kSink, kSpecial, kLabel };
    Kind kind = kSink;
    std::string name;               // register, symbol, special register or label
    int reg = -1;                   // index into KernelAst::registers
    uint64_t bits = 0;              // integer value or float bits
    int float_width = 0;            // 32 or 64 for kFloat
    int64_t offset = 0;             // [base + offset], symbol + offset
    bool negated = false;           // !p
    std::vector<Operand> elements;  // vector; address: base first, then coordinates; d|p: one element
};

struct InstructionAst {
    std::string opcode;             // without modifiers
    std::vector<std::string> mods;  // "sync", "shared::cta", "b32"
    std::vector<Operand> operands;
    int guard = -1;  // register index of the predicate
    bool guard_negated = false;
    int line = 0;

    std::string full_name() const;
    bool has(const std::string& mod) const;
};

struct RegisterAst {
    std::string name;
    int width = 0;  // 1 for a predicate, else 16, 32, 64 (8 is held as 16)
};

struct VariableAst {
    std::string name;
    Space space = Space::kGlobal;
    uint32_t alignment = 1;
    uint64_t size = 0;  // bytes; 0 for an extern array
    bool is_extern = false;
    std::vector<uint8_t> initial;
    struct AddressInit {
        uint64_t at;
        std::string symbol;
        int64_t offset;
        bool generic;
    };
    std::vector<AddressInit> address_inits;
    int line = 0;
};

struct ParamAst {
    std::string name;
    uint32_t offset = 0;
    uint32_t size = 0;
    uint32_t alignment = 1;
};

struct KernelAst {
    std::string name;
    int line = 0;
    bool is_entry = true;
    std::vector<ParamAst> params;
    uint32_t param_bytes = 0;
    std::map<std::string, std::vector<uint32_t>> directives;  // "maxntid" -> {384, 1, 1}
    std::vector<RegisterAst> registers;
    std::vector<VariableAst> variables;  // .shared and .local of the body
    std::vector<InstructionAst> instructions;
    std::map<std::string, int> labels;  // scoped label name -> instruction index
};

struct ModuleAst {
    std::string target;
    int version_major = 0;
    int version_minor = 0;
    std::vector<VariableAst> variables;
    std::vector<KernelAst> kernels;
};

}  // namespace sim
