// Decoders that share a mnemonic: add, mul, min ... exist for integers, floats and halves.
#pragma once

#include "decoder.h"
#include "float_formats.h"

namespace sim {

void decode_integer_add(Decoder& d, Type type);
bool decode_add_with_carry(Decoder& d);  // false when the instruction has no carry
void decode_integer_min_max(Decoder& d, Type type);
void decode_integer_mul(Decoder& d, Type type);
void decode_integer_div(Decoder& d, Type type);
void decode_integer_neg_abs(Decoder& d, Type type);
void decode_half_arithmetic(Decoder& d, Type type);

// rz, rm, rp of f32 and f64; operands are decoded already.
void decode_directed(Decoder& d, Type type, Rounding rounding, bool ftz, bool sat);

void register_special_functions(DecodeTable& table);

}  // namespace sim
