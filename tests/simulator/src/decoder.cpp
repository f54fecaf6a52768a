#include "decoder.h"

#include <cstring>

#include "control_flow.h"
#include "lanes.h"
#include "ptx_parser.h"

namespace sim {

namespace {

struct TypeInfo {
    const char* name;
    Type type;
    uint32_t bytes;
};
const TypeInfo kTypes[] = {
    {"b8", Type::kB8, 1},         {"u8", Type::kU8, 1},       {"s8", Type::kS8, 1},
    {"b16", Type::kB16, 2},       {"u16", Type::kU16, 2},     {"s16", Type::kS16, 2},
    {"f16", Type::kF16, 2},       {"bf16", Type::kBf16, 2},   {"b32", Type::kB32, 4},
    {"u32", Type::kU32, 4},       {"s32", Type::kS32, 4},     {"f32", Type::kF32, 4},
    {"tf32", Type::kTf32, 4},     {"f16x2", Type::kF16x2, 4}, {"bf16x2", Type::kBf16x2, 4},
    {"e4m3", Type::kE4m3, 1},     {"e5m2", Type::kE5m2, 1},   {"e4m3x2", Type::kE4m3x2, 2},
    {"e5m2x2", Type::kE5m2x2, 2}, {"b64", Type::kB64, 8},     {"u64", Type::kU64, 8},
    {"s64", Type::kS64, 8},       {"f64", Type::kF64, 8},     {"pred", Type::kPred, 0}};

const DecodeTable& table() {
    static const DecodeTable all = [] {
        DecodeTable t;
        register_multiply(t);
        register_logic(t);
        register_bits(t);
        register_float(t);
        register_moves(t);
        register_compare(t);
        register_convert(t);
        register_memory(t);
        register_atomics(t);
        register_async_store(t);
        register_control(t);
        register_warp_ops(t);
        register_matrix_moves(t);
        register_barriers(t);
        register_mbarrier(t);
        register_cp_async(t);
        register_wgmma(t);
        register_mma_sync(t);
        register_fences(t);
        return t;
    }();
    return all;
}

Step move_symbol(Warp& w, const Op& op, uint32_t mask) {
    uint64_t value = static_cast<uint64_t>(op.imm);
    if (op.space == Space::kSharedCta) {
        value += uint64_t{w.cta->rank} << kRankShift;
    }
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        if (op.code == 8) {
            destination<uint64_t>(w, op.d)[i] = value;
        } else {
            destination<uint32_t>(w, op.d)[i] = static_cast<uint32_t>(value);
        }
    }
    return Step::kNext;
}

}  // namespace

uint32_t bytes_of(Type type) {
    static const std::vector<uint32_t> bytes = [] {
        std::vector<uint32_t> all(static_cast<size_t>(Type::kPred) + 1, 0);
        for (const TypeInfo& info : kTypes) {
            all[static_cast<size_t>(info.type)] = info.bytes;
        }
        return all;
    }();
    return bytes[static_cast<size_t>(type)];
}

bool is_signed(Type type) {
    return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

Type parse_type(const std::string& name) {
    for (const TypeInfo& info : kTypes) {
        if (name == info.name) {
            return info.type;
        }
    }
    return Type::kNone;
}

void Decoder::fail(const std::string& message) const {
    throw SimError(ErrorKind::kParse,
                   "PTX line " + std::to_string(in_->line) + ": " + in_->full_name() + ": " + message,
                   in_->line);
}

void Decoder::decode(const InstructionAst& in) {
    in_ = &in;
    op = Op{};
    op.line = in.line;
    taken_.assign(in.mods.size(), false);
    before_.clear();
    read_slots_.clear();
    written_slots_.clear();
    read_preds_.clear();
    written_preds_.clear();
    scratch_used_ = 0;
    auto found = in.mods.empty() ? table().end() : table().find(in.opcode + "." + in.mods.front());
    if (found == table().end()) {
        found = table().find(in.opcode);
    }
    if (found == table().end()) {
        fail("unknown instruction");
    }
    if (in.guard >= 0) {
        op.guard = layout_[static_cast<size_t>(in.guard)] | (in.guard_negated ? kNegateBit : 0);
    }
    found->second(*this);
    check_all_taken();
    if (op.run == nullptr) {
        fail("this form is not supported");
    }
    for (Op& extra : before_) {
        extra.line = in.line;
        program_.ops.push_back(extra);
        program_.names.push_back("mov");
    }
    fill_dataflow();
    program_.ops.push_back(op);
    program_.names.push_back(in.full_name());
}

void Decoder::fill_dataflow() {
    const auto store = [&](const std::vector<uint32_t>& values, uint32_t& first, uint16_t& size) {
        first = static_cast<uint32_t>(program_.lists.size());
        size = static_cast<uint16_t>(values.size());
        program_.lists.insert(program_.lists.end(), values.begin(), values.end());
    };
    store(read_slots_, op.reads, op.reads_size);
    store(written_slots_, op.writes, op.writes_size);
    store(read_preds_, op.pred_reads, op.pred_reads_size);
    store(written_preds_, op.pred_writes, op.pred_writes_size);
}

void Decoder::check_all_taken() const {
    for (size_t i = 0; i < taken_.size(); ++i) {
        if (!taken_[i]) {
            fail("modifier ." + in_->mods[i] + " is not supported here");
        }
    }
}

bool Decoder::take(const std::string& mod) {
    for (size_t i = 0; i < taken_.size(); ++i) {
        if (!taken_[i] && in_->mods[i] == mod) {
            taken_[i] = true;
            return true;
        }
    }
    return false;
}

std::string Decoder::take_any(std::initializer_list<const char*> mods, const char* otherwise) {
    for (const char* mod : mods) {
        if (take(mod)) {
            return mod;
        }
    }
    if (otherwise == nullptr) {
        std::string choices;
        for (const char* mod : mods) {
            choices += std::string(choices.empty() ? "." : ", .") + mod;
        }
        fail("expected one of " + choices);
    }
    return otherwise;
}

bool Decoder::take_prefix(const std::string& prefix, std::string* rest) {
    for (size_t i = 0; i < taken_.size(); ++i) {
        if (!taken_[i] && in_->mods[i].compare(0, prefix.size(), prefix) == 0) {
            taken_[i] = true;
            *rest = in_->mods[i].substr(prefix.size());
            return true;
        }
    }
    return false;
}

Type Decoder::take_type_if_any() {
    for (size_t i = 0; i < taken_.size(); ++i) {
        const Type type = taken_[i] ? Type::kNone : parse_type(in_->mods[i]);
        if (type != Type::kNone) {
            taken_[i] = true;
            return type;
        }
    }
    return Type::kNone;
}

Type Decoder::take_type() {
    const Type type = take_type_if_any();
    if (type == Type::kNone) {
        fail("a type is missing");
    }
    return type;
}

Space Decoder::take_space(Space otherwise) {
    static const std::pair<const char*, Space> spaces[] = {
        {"global", Space::kGlobal},         {"const", Space::kConst},
        {"param", Space::kParam},           {"param::entry", Space::kParam},
        {"local", Space::kLocal},           {"shared", Space::kSharedCta},
        {"shared::cta", Space::kSharedCta}, {"shared::cluster", Space::kSharedCluster}};
    // In the order written: a copy names its destination first.
    for (size_t i = 0; i < taken_.size(); ++i) {
        for (const auto& [name, space] : spaces) {
            if (!taken_[i] && in_->mods[i] == name) {
                taken_[i] = true;
                return space;
            }
        }
    }
    return otherwise;
}

void Decoder::need_operands(size_t least, size_t most) {
    if (operand_count() < least || operand_count() > most) {
        fail(format("takes %zu to %zu operands, not %zu", least, most, operand_count()));
    }
}

const Operand& Decoder::operand(size_t index) const {
    if (index >= in_->operands.size()) {
        fail(format("operand %zu is missing", index + 1));
    }
    return in_->operands[index];
}

uint32_t Decoder::width_of(const Operand& operand) const {
    if (operand.kind != Operand::kRegister) {
        return 0;
    }
    return static_cast<uint32_t>(kernel_.ast.registers[static_cast<size_t>(operand.reg)].width) / 8;
}

Ref Decoder::dest(const Operand& operand, uint32_t bytes, bool may_be_wider) {
    if (operand.kind == Operand::kSink) {
        return scratch();
    }
    if (operand.kind != Operand::kRegister) {
        fail("the destination is not a register");
    }
    const uint32_t width = width_of(operand);
    const bool fits = width == bytes || (bytes == 1 && width == 2) || (may_be_wider && width > bytes);
    if (!fits) {
        fail(format("register %s has %u bits, the instruction needs %u", operand.name.c_str(), width * 8,
                    bytes * 8));
    }
    const uint32_t offset = layout_[static_cast<size_t>(operand.reg)];
    written_slots_.push_back(offset / 64);
    return offset;
}

Ref Decoder::src(const Operand& operand, Type type, bool may_be_wider) {
    const uint32_t bytes = std::max(bytes_of(type), 2u);
    switch (operand.kind) {
        case Operand::kRegister: {
            const uint32_t width = width_of(operand);
            if (width != bytes && !(may_be_wider && width > bytes)) {
                fail(format("register %s has %u bits, the instruction reads %u", operand.name.c_str(),
                            std::max(width * 8, 1u), bytes * 8));
            }
            const uint32_t offset = layout_[static_cast<size_t>(operand.reg)];
            read_slots_.push_back(offset / 64);
            return offset;
        }
        case Operand::kInteger:
            return constant(operand.bits, bytes);
        case Operand::kFloat: {
            if (bytes == 4 && operand.float_width == 64) {
                return constant(as_bits(static_cast<float>(as_double(operand.bits))), 4);
            }
            if (operand.float_width != static_cast<int>(bytes) * 8) {
                fail("floating-point literal of another width");
            }
            return constant(operand.bits, bytes);
        }
        case Operand::kSymbol:
            return symbol_value(operand, bytes);
        case Operand::kSpecial:
            return special_value(operand, bytes);
        default:
            fail("unexpected kind of source operand");
    }
}

Ref Decoder::constant(uint64_t bits, uint32_t bytes) {
    bits = bytes >= 8 ? bits : bits & ((uint64_t{1} << (8 * bytes)) - 1);
    const auto found = constants_.find({bits, bytes});
    if (found != constants_.end()) {
        return found->second;
    }
    const Ref ref = static_cast<Ref>(program_.constants.size()) | kConstantBit;
    for (int i = 0; i < kLanes; ++i) {
        const uint8_t* raw = reinterpret_cast<const uint8_t*>(&bits);
        program_.constants.insert(program_.constants.end(), raw, raw + bytes);
    }
    constants_[{bits, bytes}] = ref;
    return ref;
}

PredRef Decoder::pred_dest(const Operand& operand) {
    if (operand.kind == Operand::kSink) {
        return kNone;
    }
    if (operand.kind != Operand::kRegister ||
        kernel_.ast.registers[static_cast<size_t>(operand.reg)].width != 1) {
        fail("the destination is not a predicate");
    }
    const uint32_t index = layout_[static_cast<size_t>(operand.reg)];
    written_preds_.push_back(index);
    return index;
}

PredRef Decoder::pred_src(const Operand& operand) {
    const uint32_t negate = operand.negated ? kNegateBit : 0;
    if (operand.kind == Operand::kSpecial) {
        fail("move " + operand.name + " into a register first");
    }
    if (operand.kind == Operand::kInteger) {
        return (operand.bits != 0 ? kPredTrue : kPredFalse) | negate;
    }
    if (operand.kind != Operand::kRegister ||
        kernel_.ast.registers[static_cast<size_t>(operand.reg)].width != 1) {
        fail("operand '" + operand.name + "' is not a predicate");
    }
    const uint32_t index = layout_[static_cast<size_t>(operand.reg)];
    read_preds_.push_back(index);
    return index | negate;
}

uint64_t Decoder::integer(const Operand& operand) {
    if (operand.kind != Operand::kInteger) {
        fail("expected an integer literal");
    }
    return operand.bits;
}

Ref Decoder::address(const Operand& operand, bool* wide) {
    if (operand.kind != Operand::kAddress) {
        fail("expected an [address]");
    }
    const Operand& base = operand.elements[0];
    op.imm = operand.offset;
    if (base.kind == Operand::kRegister) {
        const uint32_t width = width_of(base);
        if (width != 4 && width != 8) {
            fail("an address register has 32 or 64 bits");
        }
        *wide = width == 8;
        return src(base, width == 8 ? Type::kB64 : Type::kB32);
    }
    *wide = true;
    return src(base, Type::kB64);
}

uint32_t Decoder::list(const std::vector<Ref>& refs) {
    const uint32_t first = static_cast<uint32_t>(program_.lists.size());
    program_.lists.insert(program_.lists.end(), refs.begin(), refs.end());
    return first;
}

// A few slots behind the allocated registers, for sinks and moved symbols of one instruction.
Ref Decoder::scratch() {
    constexpr uint32_t kSlots = 8;
    if (scratch_used_ == kSlots) {
        fail("too many operands need a scratch register");
    }
    return program_.register_bytes + scratch_used_++ * 256;
}

const SymbolAddress* Decoder::find_symbol(const std::string& name) const {
    const auto found = symbols_.find(name);
    return found == symbols_.end() ? nullptr : &found->second;
}

Ref Decoder::symbol_value(const Operand& operand, uint32_t bytes) {
    const SymbolAddress* symbol = find_symbol(operand.name);
    if (symbol == nullptr) {
        fail("unknown name '" + operand.name + "'");
    }
    const uint64_t value = symbol->address + static_cast<uint64_t>(operand.offset);
    if (symbol->space != Space::kSharedCta) {
        return constant(value, bytes);
    }
    Op move;
    move.run = move_symbol;
    move.space = symbol->space;
    move.imm = static_cast<int64_t>(value);
    move.code = static_cast<uint16_t>(bytes);
    move.op_class = OpClass::kMove;
    move.d = scratch();
    emit(move);
    return move.d;
}

Ref Decoder::special_value(const Operand& operand, uint32_t bytes) {
    Op move;
    int64_t code = 0;
    move.run = special_register_handler(operand.name, bytes, &code);
    if (move.run == nullptr) {
        fail("unknown special register " + operand.name);
    }
    move.imm = code;
    move.op_class = OpClass::kMove;
    move.d = scratch();
    emit(move);
    return move.d;
}

}  // namespace sim
