#include "statistics.h"

#include "errors.h"

namespace sim {

const char* name_of(OpClass op_class) {
    static const char* const names[] = {
        "alu",         "float",        "convert",     "move",         "special_function", "control",
        "load_global", "store_global", "load_shared", "store_shared", "load_other",       "atomic",
        "matrix_move", "warp",         "barrier",     "mbarrier",     "cp_async",         "tma",
        "wgmma",       "fence",        "other"};
    static_assert(sizeof names / sizeof names[0] == static_cast<size_t>(OpClass::kCount),
                  "a name for each class");
    return names[static_cast<size_t>(op_class)];
}

void Statistics::add(const Statistics& other) {
    for (size_t i = 0; i < instructions.size(); ++i) {
        instructions[i] += other.instructions[i];
    }
    for (const auto& [role, counts] : other.by_role) {
        for (size_t i = 0; i < counts.size(); ++i) {
            by_role[role][i] += counts[i];
        }
    }
    for (const auto& [shape, count] : other.wgmma) {
        wgmma[shape] += count;
    }
    for (const auto& [path, count] : other.bytes) {
        bytes[path] += count;
    }
    shared.add(other.shared);
    for (const auto& [line, instruction] : other.shared_by_line) {
        InstructionCounts& mine = shared_by_line[line];
        mine.opcode = instruction.opcode;
        mine.counts.add(instruction.counts);
    }
    for (const auto& [cta, counts] : other.shared_by_cta) {
        shared_by_cta[cta].add(counts);
    }
    warp_instructions += other.warp_instructions;
}

namespace {

std::string number(uint64_t value) {
    return std::to_string(value);
}

std::string json_counts(const Statistics::Counts& counts) {
    std::string text = "{";
    for (size_t i = 0; i < counts.size(); ++i) {
        if (counts[i] != 0) {
            text += (text.size() > 1 ? ", \"" : "\"") + std::string(name_of(static_cast<OpClass>(i))) +
                    "\": " + number(counts[i]);
        }
    }
    return text + "}";
}

std::string json_map(const std::map<std::string, uint64_t>& values) {
    std::string text = "{";
    for (const auto& [name, value] : values) {
        text += (text.size() > 1 ? ", \"" : "\"") + name + "\": " + number(value);
    }
    return text + "}";
}

// The members of an object, without its braces.
std::string members(const SharedCounts& counts) {
    return "\"executed\": " + number(counts.executed) + ", \"wavefronts\": " + number(counts.wavefronts) +
           ", \"extra_wavefronts\": " + number(counts.extra_wavefronts) +
           ", \"wgmma_a_bytes\": " + number(counts.wgmma_a_bytes) +
           ", \"wgmma_b_bytes\": " + number(counts.wgmma_b_bytes);
}

std::string json_shared(const Statistics& statistics, bool places) {
    std::string text = "{" + members(statistics.shared);
    if (places) {
        std::string lines, ctas;
        for (const auto& [line, instruction] : statistics.shared_by_line) {
            lines += (lines.empty() ? "{\"line\": " : ", {\"line\": ") + std::to_string(line) +
                     ", \"opcode\": \"" + instruction.opcode + "\", " + members(instruction.counts) + "}";
        }
        for (const auto& [cta, counts] : statistics.shared_by_cta) {
            ctas += (ctas.empty() ? "{\"cta\": [" : ", {\"cta\": [") + number(cta[0]) + ", " +
                    number(cta[1]) + ", " + number(cta[2]) + "], " + members(counts) + "}";
        }
        text += ", \"by_line\": [" + lines + "], \"by_cta\": [" + ctas + "]";
    }
    return text + "}";
}

}  // namespace

std::string Statistics::json(bool places) const {
    std::string roles = "{";
    for (const auto& [role, counts] : by_role) {
        roles += (roles.size() > 1 ? ", \"" : "\"") + role + "\": " + json_counts(counts);
    }
    roles += "}";
    return "{\"warp_instructions\": " + number(warp_instructions) +
           ", \"instructions\": " + json_counts(instructions) + ", \"by_role\": " + roles +
           ", \"wgmma\": " + json_map(wgmma) + ", \"bytes\": " + json_map(bytes) +
           ", \"shared\": " + json_shared(*this, places) + "}";
}

}  // namespace sim
