// A kernel decoded for execution: one Op per instruction, registers packed into lane arrays.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "memory_sync.h"
#include "ptx_ast.h"

namespace sim {

struct Warp;
struct Op;

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;

// What the interpreter does after an instruction.
enum class Step : uint8_t {
    kNext,     // go on with the next instruction
    kJump,     // the handler changed the fragments or their pc
    kBlocked,  // Fragment::wait says for what; the instruction runs again when it is over
    kYield,    // done with this instruction, but let others run
};

using Handler = Step (*)(Warp& warp, const Op& op, uint32_t mask);

// A register operand: byte offset into the warp's registers, or with the top bit into the constants.
using Ref = uint32_t;
constexpr Ref kConstantBit = 0x80000000u;
// A predicate operand: index into the warp's predicates, the top bit negates it.
using PredRef = uint32_t;
constexpr PredRef kNegateBit = 0x80000000u;
constexpr uint32_t kPredFalse = 0;
constexpr uint32_t kPredTrue = 1;
constexpr uint32_t kFirstPred = 2;

enum class OpClass : uint8_t {
    kAlu,
    kFloat,
    kConvert,
    kMove,
    kSpecialFunction,
    kControl,
    kLoadGlobal,
    kStoreGlobal,
    kLoadShared,
    kStoreShared,
    kLoadOther,
    kAtomic,
    kMatrixMove,
    kWarp,
    kBarrier,
    kMbarrier,
    kAsyncCopy,
    kTma,
    kWgmma,
    kFence,
    kOther,
    kCount
};
using OpCounts = std::array<uint64_t, static_cast<size_t>(OpClass::kCount)>;
const char* name_of(OpClass op_class);

// How the checker treats undefined inputs and registers of a wgmma in flight.
enum class Dataflow : uint8_t {
    kPropagate,  // an undefined input makes the output undefined
    kRequire,    // an undefined input is an error here (stores, addresses, branches)
    kCopy,       // a register move: also follows accumulators in flight
    kOwn,        // the handler looks after it (wgmma)
};

struct Op {
    Handler run = nullptr;
    Ref d = kNone, d2 = kNone, a = kNone, b = kNone, c = kNone, e = kNone;
    PredRef p = kNone, q = kNone;  // predicate sources or destinations
    PredRef guard = kNone;
    int64_t imm = 0;    // address offset, immediate, constant
    uint32_t list = 0;  // first element in Program::lists
    uint16_t list_size = 0;
    uint16_t code = 0, code2 = 0;  // family-specific
    uint32_t target = 0;           // jump target, reconvergence in `target2`, side-table index
    uint32_t target2 = 0;
    Space space = Space::kGeneric;
    OpClass op_class = OpClass::kOther;
    Dataflow dataflow = Dataflow::kPropagate;
    uint8_t memory_order = 0;        // of a strong access: kAcquires, kReleases
    Level level = kWeak;             // its scope
    uint16_t access = 0;             // in Program::accesses, of what may touch global memory
    bool control = false;            // runs even when the guard leaves no lane
    uint32_t reads = 0, writes = 0;  // Program::lists: slots read and written, for the checker
    uint16_t reads_size = 0, writes_size = 0;
    uint32_t pred_reads = 0, pred_writes = 0;
    uint16_t pred_reads_size = 0, pred_writes_size = 0;
    int line = 0;
};

enum class Type : uint8_t {
    kNone,
    kB8,
    kU8,
    kS8,
    kB16,
    kU16,
    kS16,
    kF16,
    kBf16,
    kB32,
    kU32,
    kS32,
    kF32,
    kTf32,
    kF16x2,
    kBf16x2,
    kE4m3,
    kE5m2,
    kE4m3x2,
    kE5m2x2,
    kB64,
    kU64,
    kS64,
    kF64,
    kPred
};

struct WgmmaShape {
    int n = 0, k = 0;
    Type d = Type::kF32, a = Type::kF16, b = Type::kF16;
    bool negate_a = false, negate_b = false;
    bool transpose_a = false, transpose_b = false;  // MN-major
    bool a_in_registers = false;
    uint32_t accumulators = 0;  // Program::lists: one Ref per register
    uint32_t accumulator_count = 0;
    uint32_t a_registers = 0;  // Program::lists: four Refs
    std::string name;          // "m64n128k16.f32.bf16.bf16"
};

// What is fixed of an instruction that may touch global memory.
struct GlobalAccessInfo {
    int line = 0;
    bool writes = false, reads = false;
    Level level = kWeak;
};

struct Program {
    std::vector<Op> ops;
    std::vector<GlobalAccessInfo> accesses{1};  // from 1
    std::vector<uint32_t> lists;
    std::vector<uint8_t> constants;  // lane arrays
    uint32_t register_bytes = 0;
    uint32_t predicate_count = kFirstPred;
    uint32_t local_bytes = 0;
    bool launches_dependents = false;  // has griddepcontrol.launch_dependents
    std::vector<std::string> names;    // per op, the opcode as written
    std::vector<WgmmaShape> wgmma_shapes;
};

struct Kernel {
    std::string name;
    KernelAst ast;
    Program program;
    uint32_t static_shared_bytes = 0;
    uint32_t max_dynamic_shared = 48 * 1024;  // cuFuncSetAttribute
    bool non_portable_cluster = false;
    uint32_t max_threads = 1024;
    uint32_t registers_at_launch = 0;  // register_budget.h
    uint32_t required_cluster[3] = {0, 0, 0};
    std::string decode_error;
};

}  // namespace sim
