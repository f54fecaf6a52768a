// Literals and variable declarations, which bodies and modules share.
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "ptx_body_parser.h"
#include "ptx_parser.h"

namespace sim {

bool at_literal(const TokenStream& tokens) {
    const size_t at = tokens.peek_is("-") ? 1 : 0;
    return tokens.peek(at).kind == Token::kWord &&
           std::isdigit(static_cast<unsigned char>(tokens.peek(at).text[0]));
}

namespace {

uint64_t parse_integer(TokenStream& tokens, std::string word) {
    if (!word.empty() && (word.back() == 'U' || word.back() == 'u')) {
        word.pop_back();
    }
    int base = 10;
    size_t start = 0;
    if (word.size() > 1 && word[0] == '0') {
        const char marker = static_cast<char>(std::tolower(word[1]));
        base = marker == 'x' ? 16 : marker == 'b' ? 2 : 8;
        start = base == 8 ? 1 : 2;
    }
    char* end = nullptr;
    const uint64_t value = std::strtoull(word.c_str() + start, &end, base);
    if (*end != '\0') {
        tokens.fail("bad integer literal '" + word + "'");
    }
    return value;
}

}  // namespace

Operand parse_literal(TokenStream& tokens) {
    const bool minus = tokens.accept("-");
    std::string word = tokens.word();
    Operand operand;
    const char marker = word.size() > 1 ? static_cast<char>(std::tolower(word[1])) : '\0';
    const bool hexadecimal_float =
        word[0] == '0' && ((marker == 'f' && word.size() == 10) || (marker == 'd' && word.size() == 18));
    const bool decimal_float = tokens.peek_is(".") && tokens.peek().glued;
    if (hexadecimal_float) {
        operand.kind = Operand::kFloat;
        operand.float_width = marker == 'f' ? 32 : 64;
        operand.bits = std::strtoull(word.c_str() + 2, nullptr, 16);
        if (minus) {
            operand.bits ^= uint64_t{1} << (operand.float_width - 1);
        }
        return operand;
    }
    if (decimal_float) {
        tokens.advance();
        word += ".";
        if (tokens.peek().kind == Token::kWord && tokens.peek().glued) {
            word += tokens.word();
        }
        operand.kind = Operand::kFloat;
        operand.float_width = 64;
        const double value = minus ? -std::atof(word.c_str()) : std::atof(word.c_str());
        std::memcpy(&operand.bits, &value, sizeof value);
        return operand;
    }
    operand.kind = Operand::kInteger;
    operand.bits = parse_integer(tokens, word);
    if (minus) {
        operand.bits = uint64_t{0} - operand.bits;
    }
    return operand;
}

namespace {

void append_initial(TokenStream& tokens, VariableAst& variable, uint32_t element) {
    if (tokens.accept("{")) {
        while (!tokens.accept("}")) {
            append_initial(tokens, variable, element);
            tokens.accept(",");
        }
        return;
    }
    uint64_t bits = 0;
    if (at_literal(tokens)) {
        Operand literal = parse_literal(tokens);
        bits = literal.bits;
        if (literal.kind == Operand::kFloat && literal.float_width == 64 && element == 4) {
            double value;
            std::memcpy(&value, &bits, sizeof value);
            const float narrow = static_cast<float>(value);
            bits = 0;
            std::memcpy(&bits, &narrow, sizeof narrow);
        }
    } else {
        std::string name = tokens.word();
        const bool generic = name == "generic";
        if (generic) {
            tokens.expect("(");
            name = tokens.word();
            tokens.expect(")");
        }
        int64_t offset = 0;
        if (tokens.accept("+")) {
            offset = static_cast<int64_t>(parse_literal(tokens).bits);
        }
        variable.address_inits.push_back({variable.initial.size(), name, offset, generic});
    }
    for (uint32_t i = 0; i < element; ++i) {
        variable.initial.push_back(static_cast<uint8_t>(bits >> (8 * i)));
    }
}

}  // namespace

VariableAst parse_variable_declaration(TokenStream& tokens, Space space) {
    VariableAst variable;
    variable.space = space;
    variable.line = tokens.peek().line;
    uint32_t element = 0;
    uint32_t lanes = 1;
    while (tokens.accept(".")) {
        const std::string word = tokens.word();
        if (word == "align") {
            variable.alignment = static_cast<uint32_t>(std::atoi(tokens.word().c_str()));
        } else if (type_bytes(word) != 0) {
            element = type_bytes(word);
        } else if (word == "v2" || word == "v4") {
            lanes = word == "v2" ? 2 : 4;
        } else if (word == "attribute") {
            tokens.skip_past(")");
        } else {
            tokens.fail("unknown variable attribute ." + word);
        }
    }
    variable.name = tokens.word();
    uint64_t count = lanes;
    while (tokens.accept("[")) {
        if (tokens.accept("]")) {
            count = 0;
            continue;
        }
        count *= std::strtoull(tokens.word().c_str(), nullptr, 0);
        tokens.expect("]");
    }
    if (element == 0) {
        tokens.fail("variable '" + variable.name + "' has no type");
    }
    variable.alignment = std::max(variable.alignment, element * lanes);
    variable.size = count * element;
    if (tokens.accept("=")) {
        append_initial(tokens, variable, element);
        if (variable.size == 0) {
            variable.size = variable.initial.size();
        }
        variable.initial.resize(variable.size);
    }
    return variable;
}

}  // namespace sim
