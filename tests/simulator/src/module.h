// A loaded PTX module: its kernels decoded, its variables given memory.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "decoder.h"
#include "program.h"

namespace sim {

struct GlobalVariable {
    uint64_t address = 0;
    uint64_t bytes = 0;
};

class Module {
  public:
    explicit Module(const std::string& ptx);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    Kernel* find_kernel(const std::string& name);
    const GlobalVariable* find_global(const std::string& name) const;
    std::vector<Kernel*> kernels();

  private:
    void place_variables(const std::vector<VariableAst>& variables);
    void fill_addresses(const std::vector<VariableAst>& variables);
    SymbolTable symbols_of(Kernel& kernel, const std::vector<VariableAst>& module_variables);

    std::map<std::string, GlobalVariable> globals_;
    std::vector<std::unique_ptr<uint8_t[]>> storage_;
    std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

}  // namespace sim
