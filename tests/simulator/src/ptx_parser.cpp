#include "ptx_parser.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "errors.h"
#include "ptx_body_parser.h"
#include "ptx_lexer.h"
#include "token_stream.h"

namespace sim {

std::string InstructionAst::full_name() const {
    std::string name = opcode;
    for (const std::string& mod : mods) {
        name += "." + mod;
    }
    return name;
}

bool InstructionAst::has(const std::string& mod) const {
    for (const std::string& m : mods) {
        if (m == mod) {
            return true;
        }
    }
    return false;
}

uint32_t type_bytes(const std::string& type) {
    static const std::unordered_map<std::string, uint32_t> bytes = {
        {"b8", 1},     {"u8", 1},   {"s8", 1},   {"b16", 2},    {"u16", 2},    {"s16", 2},
        {"f16", 2},    {"bf16", 2}, {"b32", 4},  {"u32", 4},    {"s32", 4},    {"f32", 4},
        {"b64", 8},    {"u64", 8},  {"s64", 8},  {"f64", 8},    {"b128", 16},  {"f16x2", 4},
        {"bf16x2", 4}, {"e4m3", 1}, {"e5m2", 1}, {"e4m3x2", 2}, {"e5m2x2", 2}, {"tf32", 4}};
    const auto found = bytes.find(type);
    return found == bytes.end() ? 0 : found->second;
}

namespace {

uint32_t align_up(uint32_t value, uint32_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

class ModuleParser {
  public:
    explicit ModuleParser(const std::string& text) : tokens_(tokenize(text)) {}

    ModuleAst run() {
        if (tokens_.at_end()) {
            throw SimError(ErrorKind::kParse, "the PTX text is empty", 1);
        }
        while (!tokens_.at_end()) {
            parse_top_level();
        }
        if (module_.version_major == 0 || module_.target.empty()) {
            throw SimError(ErrorKind::kParse, "PTX text has no .version or no .target", 1);
        }
        return std::move(module_);
    }

  private:
    void parse_top_level() {
        tokens_.expect(".");
        const std::string directive = tokens_.word();
        if (directive == "version") {
            module_.version_major = std::atoi(tokens_.word().c_str());
            tokens_.expect(".");
            module_.version_minor = std::atoi(tokens_.word().c_str());
        } else if (directive == "target") {
            module_.target = tokens_.word();
            while (tokens_.accept(",")) {
                tokens_.word();
            }
        } else if (directive == "address_size") {
            if (tokens_.word() != "64") {
                tokens_.fail("only .address_size 64 is supported");
            }
        } else if (directive == "file" || directive == "loc") {
            skip_line();
        } else if (directive == "section") {
            skip_block();
        } else if (directive == "visible" || directive == "weak" || directive == "extern" ||
                   directive == "common") {
            linkage_extern_ = linkage_extern_ || directive == "extern";
            return;  // the declaration follows
        } else if (directive == "entry") {
            parse_entry();
        } else if (directive == "func") {
            skip_function();
        } else if (directive == "alias" || directive == "pragma") {
            tokens_.skip_past(";");
        } else {
            parse_variable(directive);
        }
        linkage_extern_ = false;
    }

    void skip_line() {
        const int line = tokens_.previous_line();
        while (!tokens_.at_end() && tokens_.peek().line == line) {
            tokens_.advance();
        }
    }

    void skip_block() {
        while (!tokens_.peek_is("{")) {
            tokens_.advance();
        }
        int depth = 0;
        do {
            if (tokens_.at_end()) {
                tokens_.fail("block is never closed");
            }
            const std::string text = tokens_.advance().text;
            depth += text == "{" ? 1 : text == "}" ? -1 : 0;
        } while (depth > 0);
    }

    // Device functions are never called by the kernels this engine runs: `call` itself is refused.
    void skip_function() {
        while (!tokens_.peek_is("{") && !tokens_.peek_is(";")) {
            tokens_.advance();
        }
        if (tokens_.accept(";")) {
            return;
        }
        skip_block();
    }

    void parse_variable(const std::string& space) {
        Space where;
        if (space == "global") {
            where = Space::kGlobal;
        } else if (space == "const") {
            where = Space::kConst;
        } else if (space == "shared") {
            where = Space::kSharedCta;
        } else {
            tokens_.fail("unknown directive ." + space);
        }
        VariableAst variable = parse_variable_declaration(tokens_, where);
        variable.is_extern = linkage_extern_ || variable.size == 0;
        tokens_.expect(";");
        module_.variables.push_back(variable);
    }

    void parse_entry() {
        KernelAst kernel;
        kernel.line = tokens_.peek().line;
        kernel.name = tokens_.word();
        if (tokens_.accept("(")) {
            while (!tokens_.accept(")")) {
                parse_param(kernel);
                tokens_.accept(",");
            }
        }
        while (tokens_.accept(".")) {
            parse_kernel_directive(kernel);
        }
        if (tokens_.accept(";")) {
            return;  // a prototype
        }
        parse_kernel_body(tokens_, kernel);
        module_.kernels.push_back(std::move(kernel));
    }

    void parse_kernel_directive(KernelAst& kernel) {
        const std::string name = tokens_.word();
        std::vector<uint32_t>& values = kernel.directives[name];
        if (name == "pragma") {
            tokens_.skip_past(";");
            return;
        }
        while (!tokens_.peek_is("{") && !tokens_.peek_is(".") && !tokens_.peek_is(";")) {
            values.push_back(static_cast<uint32_t>(std::strtoul(tokens_.word().c_str(), nullptr, 0)));
            tokens_.accept(",");
        }
    }

    void parse_param(KernelAst& kernel) {
        tokens_.expect(".");
        if (tokens_.word() != "param") {
            tokens_.fail("expected .param");
        }
        ParamAst param;
        uint32_t element = 0;
        uint32_t alignment = 0;
        while (tokens_.accept(".")) {
            const std::string word = tokens_.word();
            if (word == "align") {
                // Also the pointee's alignment of `.ptr .global .align n`, which says nothing of the layout.
                const uint32_t value = static_cast<uint32_t>(std::atoi(tokens_.word().c_str()));
                alignment = element == 0 ? value : alignment;
            } else if (type_bytes(word) != 0) {
                element = type_bytes(word);
            } else if (word != "ptr" && word != "global" && word != "const" && word != "shared" &&
                       word != "local") {
                tokens_.fail("unknown parameter attribute ." + word);
            }
        }
        param.name = tokens_.word();
        uint32_t count = 1;
        while (tokens_.accept("[")) {
            count *= static_cast<uint32_t>(std::strtoul(tokens_.word().c_str(), nullptr, 0));
            tokens_.expect("]");
        }
        param.alignment = alignment != 0 ? alignment : element;
        param.size = element * count;
        param.offset = align_up(kernel.param_bytes, param.alignment);
        kernel.param_bytes = param.offset + param.size;
        kernel.params.push_back(param);
    }

    TokenStream tokens_;
    ModuleAst module_;
    bool linkage_extern_ = false;
};

}  // namespace

ModuleAst parse_ptx(const std::string& text) {
    return ModuleParser(text).run();
}

}  // namespace sim
