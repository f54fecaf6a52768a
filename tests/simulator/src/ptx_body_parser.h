// Kernel bodies (scopes, registers, labels, instructions) and variable declarations.
#pragma once

#include "ptx_ast.h"
#include "token_stream.h"

namespace sim {

void parse_kernel_body(TokenStream& tokens, KernelAst& kernel);

// After the state space: `.align 8 .b8 name[16] = {...}`; the semicolon is left.
VariableAst parse_variable_declaration(TokenStream& tokens, Space space);

// An integer or float literal; the cursor stands on it (a sign included).
Operand parse_literal(TokenStream& tokens);
bool at_literal(const TokenStream& tokens);

}  // namespace sim
