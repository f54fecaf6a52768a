#include "ptx_body_parser.h"

#include <cctype>
#include <cstdlib>
#include <unordered_map>

#include "ptx_parser.h"

namespace sim {
namespace {

struct PendingLabel {
    size_t instruction;
    size_t operand;
    int line;
};

// One `{ }` of the body: inline assembly declares its registers and labels in one of its own.
struct Scope {
    std::unordered_map<std::string, int> registers;
    std::unordered_map<std::string, std::string> labels;  // name as written -> unique name
    std::vector<PendingLabel> pending;
};

class BodyParser {
  public:
    BodyParser(TokenStream& tokens, KernelAst& kernel) : tokens_(tokens), kernel_(kernel) {}

    void run() {
        tokens_.expect("{");
        scopes_.emplace_back();
        while (!scopes_.empty()) {
            parse_statement();
        }
    }

  private:
    void parse_statement() {
        if (tokens_.accept("{")) {
            scopes_.emplace_back();
        } else if (tokens_.accept("}")) {
            close_scope();
        } else if (tokens_.accept(";")) {
            return;
        } else if (tokens_.accept(".")) {
            parse_directive();
        } else if (tokens_.peek().kind == Token::kWord && tokens_.peek_is(":", 1)) {
            parse_label();
        } else {
            parse_instruction();
        }
    }

    void parse_label() {
        const std::string name = tokens_.word();
        tokens_.expect(":");
        const std::string unique = format("%s#%zu", name.c_str(), kernel_.labels.size());
        if (!scopes_.back().labels.emplace(name, unique).second) {
            tokens_.fail("label '" + name + "' is defined twice in one scope");
        }
        kernel_.labels[unique] = static_cast<int>(kernel_.instructions.size());
    }

    void close_scope() {
        Scope scope = std::move(scopes_.back());
        scopes_.pop_back();
        for (const PendingLabel& pending : scope.pending) {
            Operand& operand = kernel_.instructions[pending.instruction].operands[pending.operand];
            const auto found = scope.labels.find(operand.name);
            if (found != scope.labels.end()) {
                operand.name = found->second;
            } else if (scopes_.empty()) {
                throw SimError(ErrorKind::kParse, "unknown label '" + operand.name + "'", pending.line);
            } else {
                scopes_.back().pending.push_back(pending);
            }
        }
    }

    void parse_directive() {
        const std::string directive = tokens_.word();
        if (directive == "reg") {
            parse_registers();
        } else if (directive == "shared" || directive == "local") {
            const Space space = directive == "shared" ? Space::kSharedCta : Space::kLocal;
            kernel_.variables.push_back(parse_variable_declaration(tokens_, space));
            tokens_.expect(";");
        } else if (directive == "loc") {
            const int line = tokens_.previous_line();
            while (!tokens_.at_end() && tokens_.peek().line == line) {
                tokens_.advance();
            }
        } else if (directive == "pragma") {
            tokens_.skip_past(";");
        } else {
            tokens_.fail("unknown directive ." + directive + " in a kernel body");
        }
    }

    void parse_registers() {
        tokens_.expect(".");
        const std::string type = tokens_.word();
        int width = type == "pred" ? 1 : static_cast<int>(type_bytes(type)) * 8;
        if (width == 8) {
            width = 16;
        }
        if (width == 0 || width == 128) {
            tokens_.fail("registers of type ." + type + " are not supported");
        }
        do {
            const std::string name = tokens_.word();
            if (!tokens_.accept("<")) {
                declare_register(name, width);
                continue;
            }
            const int count = std::atoi(tokens_.word().c_str());
            tokens_.expect(">");
            for (int i = 0; i < count; ++i) {
                declare_register(name + std::to_string(i), width);
            }
        } while (tokens_.accept(","));
        tokens_.expect(";");
    }

    void declare_register(const std::string& name, int width) {
        scopes_.back().registers[name] = static_cast<int>(kernel_.registers.size());
        kernel_.registers.push_back({name, width});
    }

    int find_register(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            const auto found = scope->registers.find(name);
            if (found != scope->registers.end()) {
                return found->second;
            }
        }
        return -1;
    }

    void parse_instruction() {
        InstructionAst instruction;
        instruction.line = tokens_.peek().line;
        if (tokens_.accept("@")) {
            instruction.guard_negated = tokens_.accept("!");
            const std::string name = tokens_.word();
            instruction.guard = find_register(name);
            if (instruction.guard < 0 || kernel_.registers[instruction.guard].width != 1) {
                tokens_.fail("guard '" + name + "' is not a declared predicate");
            }
        }
        instruction.opcode = tokens_.word();
        parse_modifiers(instruction);
        if (instruction.opcode == "call") {
            tokens_.skip_past(";");
            kernel_.instructions.push_back(std::move(instruction));
            return;
        }
        while (!tokens_.accept(";")) {
            instruction.operands.push_back(parse_operand());
            if (!tokens_.peek_is(";")) {
                tokens_.expect(",");
            }
        }
        finish(std::move(instruction));
    }

    void parse_modifiers(InstructionAst& instruction) {
        while (tokens_.accept(".")) {
            std::string mod = tokens_.word();
            while (tokens_.accept("::")) {
                mod += "::" + tokens_.word();
            }
            instruction.mods.push_back(mod);
        }
    }

    void finish(InstructionAst instruction) {
        const size_t index = kernel_.instructions.size();
        if (instruction.opcode == "bra") {
            if (instruction.operands.size() != 1 || instruction.operands[0].name.empty()) {
                throw SimError(ErrorKind::kParse, "bra needs one label", instruction.line);
            }
            instruction.operands[0].kind = Operand::kLabel;
            scopes_.back().pending.push_back({index, 0, instruction.line});
        }
        kernel_.instructions.push_back(std::move(instruction));
    }

    Operand parse_operand() {
        if (tokens_.accept("[")) {
            return parse_address();
        }
        if (tokens_.accept("{")) {
            return parse_vector();
        }
        if (tokens_.accept("!")) {
            Operand operand = parse_operand();
            operand.negated = true;
            return operand;
        }
        if (at_literal(tokens_)) {
            return parse_literal(tokens_);
        }
        Operand operand = parse_name();
        if (tokens_.accept("|")) {
            operand.elements.push_back(parse_name());
        } else if (operand.kind == Operand::kSymbol && tokens_.accept("+")) {
            operand.offset = static_cast<int64_t>(parse_literal(tokens_).bits);
        }
        return operand;
    }

    Operand parse_vector() {
        Operand vector;
        vector.kind = Operand::kVector;
        while (!tokens_.accept("}")) {
            vector.elements.push_back(parse_operand());
            tokens_.accept(",");
        }
        return vector;
    }

    Operand parse_address() {
        Operand address;
        address.kind = Operand::kAddress;
        address.elements.push_back(at_literal(tokens_) ? parse_literal(tokens_) : parse_name());
        while (tokens_.peek_is("+") || tokens_.peek_is("-")) {
            const bool minus = tokens_.advance().text == "-";
            const int64_t value = static_cast<int64_t>(parse_literal(tokens_).bits);
            address.offset += minus ? -value : value;
        }
        if (tokens_.accept(",")) {
            const Operand coordinates = parse_operand();
            if (coordinates.kind != Operand::kVector) {
                tokens_.fail("expected {coordinates} after the tensor map");
            }
            for (const Operand& element : coordinates.elements) {
                address.elements.push_back(element);
            }
        }
        tokens_.expect("]");
        return address;
    }

    Operand parse_name() {
        Operand operand;
        operand.name = tokens_.word();
        if (operand.name == "_") {
            operand.kind = Operand::kSink;
            return operand;
        }
        operand.reg = find_register(operand.name);
        if (operand.reg >= 0) {
            operand.kind = Operand::kRegister;
            return operand;
        }
        if (operand.name[0] != '%') {
            operand.kind = Operand::kSymbol;
            return operand;
        }
        operand.kind = Operand::kSpecial;
        if (tokens_.peek_is(".") && tokens_.peek().glued) {
            tokens_.advance();
            operand.name += "." + tokens_.word();
        }
        return operand;
    }

    TokenStream& tokens_;
    KernelAst& kernel_;
    std::vector<Scope> scopes_;
};

}  // namespace

void parse_kernel_body(TokenStream& tokens, KernelAst& kernel) {
    BodyParser(tokens, kernel).run();
}

}  // namespace sim
