// PTX text to ModuleAst. Throws SimError(kParse) with the line of what it does not understand.
#pragma once

#include "ptx_ast.h"

namespace sim {

ModuleAst parse_ptx(const std::string& text);

// Bytes of a fundamental type name ("b32", "u8", "f16x2"); 0 when it is none.
uint32_t type_bytes(const std::string& type);

}  // namespace sim
