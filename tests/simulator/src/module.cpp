#include "module.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <unordered_set>

#include "errors.h"
#include "machine.h"
#include "memory_map.h"
#include "ptx_parser.h"
#include "register_budget.h"

namespace sim {
namespace {

uint64_t align_up(uint64_t value, uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

constexpr uint64_t kDefaultShared = 48 * 1024;  // of a block, unless cuFuncSetAttribute asks for more

using Names = std::unordered_set<std::string>;

void collect_names(const Operand& operand, Names& names) {
    if (operand.kind == Operand::kSymbol) {
        names.insert(operand.name);
    }
    for (const Operand& element : operand.elements) {
        collect_names(element, names);
    }
}

// What of the module's a kernel uses: the rest takes none of its shared memory.
std::vector<VariableAst> used_variables(const KernelAst& kernel, const std::vector<VariableAst>& all) {
    Names names;
    for (const InstructionAst& in : kernel.instructions) {
        for (const Operand& operand : in.operands) {
            collect_names(operand, names);
        }
    }
    std::vector<VariableAst> used;
    std::copy_if(all.begin(), all.end(), std::back_inserter(used), [&](const VariableAst& variable) {
        return variable.space == Space::kSharedCta && names.count(variable.name) != 0;
    });
    return used;
}

// Static shared variables from kSharedBase on, the dynamic array behind them.
void place_shared(const std::vector<VariableAst>& variables, SymbolTable& symbols, uint64_t& next) {
    for (const VariableAst& variable : variables) {
        if (variable.space == Space::kSharedCta && variable.size != 0) {
            next = align_up(next, variable.alignment);
            symbols[variable.name] = {Space::kSharedCta, kSharedBase + next};
            next += variable.size;
        }
    }
}

void place_dynamic(const std::vector<VariableAst>& variables, SymbolTable& symbols, uint64_t start) {
    for (const VariableAst& variable : variables) {
        if (variable.space == Space::kSharedCta && variable.size == 0) {
            symbols[variable.name] = {Space::kSharedCta, kSharedBase + align_up(start, variable.alignment)};
        }
    }
}

uint64_t dynamic_alignment(const std::vector<VariableAst>& variables) {
    uint64_t alignment = 16;
    for (const VariableAst& variable : variables) {
        if (variable.space == Space::kSharedCta && variable.size == 0) {
            alignment = std::max<uint64_t>(alignment, variable.alignment);
        }
    }
    return alignment;
}

// The device is sm_90a: what is made for a later one, or for the features of another, does not run.
void check_target(const std::string& target) {
    const size_t digits = target.find_first_not_of("0123456789", 3);
    const std::string number = target.substr(std::min<size_t>(3, target.size()), digits - 3);
    if (target.compare(0, 3, "sm_") != 0 || number.empty() || number.size() > 3) {
        throw SimError(ErrorKind::kParse, "unknown target '" + target + "'");
    }
    if (std::stoi(number) > 90 || (digits != std::string::npos && target != "sm_90a")) {
        throw SimError(ErrorKind::kParse, "target " + target + " does not run here: the device is sm_90a");
    }
}

}  // namespace

Module::Module(const std::string& ptx) {
    ModuleAst ast = parse_ptx(ptx);
    check_target(ast.target);
    place_variables(ast.variables);
    fill_addresses(ast.variables);
    for (KernelAst& kernel_ast : ast.kernels) {
        auto kernel = std::make_unique<Kernel>();
        kernel->name = kernel_ast.name;
        kernel->ast = std::move(kernel_ast);
        const SymbolTable symbols = symbols_of(*kernel, ast.variables);
        decode_kernel(*kernel, symbols);
        const auto& directives = kernel->ast.directives;
        const auto cluster = directives.find("reqnctapercluster");
        if (cluster != directives.end()) {
            for (size_t i = 0; i < 3; ++i) {
                kernel->required_cluster[i] = i < cluster->second.size() ? cluster->second[i] : 1;
            }
        }
        for (const char* name : {"maxntid", "reqntid"}) {
            const auto found = directives.find(name);
            if (found != directives.end()) {
                kernel->max_threads = 1;
                for (uint32_t n : found->second) {
                    kernel->max_threads *= n;
                }
            }
        }
        kernel->registers_at_launch = registers_at_launch(*kernel);
        const std::string name = kernel->name;
        kernels_[name] = std::move(kernel);
    }
}

Module::~Module() {
    for (const auto& entry : globals_) {
        MemoryMap::instance().remove(entry.second.address);
    }
}

void Module::place_variables(const std::vector<VariableAst>& variables) {
    for (const VariableAst& variable : variables) {
        const bool in_memory = variable.space == Space::kGlobal || variable.space == Space::kConst;
        if (!in_memory || variable.size == 0) {
            continue;
        }
        const uint64_t room = variable.size + variable.alignment + 128;
        storage_.push_back(std::make_unique<uint8_t[]>(room));
        const uint64_t address = align_up(reinterpret_cast<uint64_t>(storage_.back().get()),
                                          std::max<uint64_t>(variable.alignment, 64));
        std::memset(reinterpret_cast<void*>(address), 0, variable.size);
        std::memcpy(reinterpret_cast<void*>(address), variable.initial.data(), variable.initial.size());
        globals_[variable.name] = {address, variable.size};
        MemoryMap::instance().add(address, variable.size, "variable " + variable.name);
    }
}

void Module::fill_addresses(const std::vector<VariableAst>& variables) {
    for (const VariableAst& variable : variables) {
        for (const VariableAst::AddressInit& init : variable.address_inits) {
            const GlobalVariable* target = find_global(init.symbol);
            if (target == nullptr) {
                throw SimError(ErrorKind::kParse,
                               "initializer of '" + variable.name + "' names unknown '" + init.symbol + "'",
                               variable.line);
            }
            const uint64_t value = target->address + static_cast<uint64_t>(init.offset);
            std::memcpy(reinterpret_cast<uint8_t*>(globals_[variable.name].address) + init.at, &value, 8);
        }
    }
}

SymbolTable Module::symbols_of(Kernel& kernel, const std::vector<VariableAst>& module_variables) {
    SymbolTable symbols;
    for (const auto& [name, global] : globals_) {
        symbols[name] = {Space::kGlobal, global.address};
    }
    for (const ParamAst& param : kernel.ast.params) {
        symbols[param.name] = {Space::kParam, param.offset};
    }
    uint64_t shared = 0;
    const std::vector<VariableAst> used = used_variables(kernel.ast, module_variables);
    place_shared(used, symbols, shared);
    place_shared(kernel.ast.variables, symbols, shared);
    if (shared > kMaxSharedBytes) {
        throw SimError(ErrorKind::kParse,
                       format("kernel %s: %llu bytes of static shared memory exceed 227 KB",
                              kernel.name.c_str(), static_cast<unsigned long long>(shared)));
    }
    const uint64_t alignment = dynamic_alignment(used);
    // As on the hardware: without static variables the dynamic array starts right at the base.
    kernel.static_shared_bytes = static_cast<uint32_t>(align_up(shared, shared == 0 ? 1 : alignment));
    place_dynamic(used, symbols, kernel.static_shared_bytes);
    kernel.max_dynamic_shared = static_cast<uint32_t>(
        kernel.static_shared_bytes < kDefaultShared ? kDefaultShared - kernel.static_shared_bytes : 0);
    uint64_t local = 0;
    for (const VariableAst& variable : kernel.ast.variables) {
        if (variable.space == Space::kLocal) {
            local = align_up(local, variable.alignment);
            symbols[variable.name] = {Space::kLocal, local};
            local += variable.size;
        }
    }
    kernel.program.local_bytes = static_cast<uint32_t>(align_up(local, 16));
    return symbols;
}

Kernel* Module::find_kernel(const std::string& name) {
    const auto found = kernels_.find(name);
    return found == kernels_.end() ? nullptr : found->second.get();
}

const GlobalVariable* Module::find_global(const std::string& name) const {
    const auto found = globals_.find(name);
    return found == globals_.end() ? nullptr : &found->second;
}

std::vector<Kernel*> Module::kernels() {
    std::vector<Kernel*> all;
    for (auto& entry : kernels_) {
        all.push_back(entry.second.get());
    }
    return all;
}

}  // namespace sim
