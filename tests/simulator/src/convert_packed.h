// cvt with two elements to a register: f16x2, bf16x2, e4m3x2, e5m2x2.
#pragma once

#include "decoder.h"
#include "float_formats.h"

namespace sim {

bool is_packed(Type type);
void decode_packed_cvt(Decoder& d, Type to, Type from, Rounding rounding, bool satfinite, bool relu);

}  // namespace sim
