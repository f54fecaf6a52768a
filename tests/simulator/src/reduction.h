// Read-modify-write operations: atom, red, and the reductions of bulk copies.
#pragma once

#include <mutex>

#include "decoder.h"

namespace sim {

enum class ReduceOp : uint16_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExchange, kCompareAndSwap };

ReduceOp take_reduce_op(Decoder& d);
uint64_t reduce_value(ReduceOp operation, Type type, uint64_t old, uint64_t b);
std::mutex& global_atomics();  // host threads run clusters side by side

}  // namespace sim
