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

}  // namespace

std::string Statistics::json() const {
    std::string roles = "{";
    for (const auto& [role, counts] : by_role) {
        roles += (roles.size() > 1 ? ", \"" : "\"") + role + "\": " + json_counts(counts);
    }
    roles += "}";
    return "{\"warp_instructions\": " + number(warp_instructions) +
           ", \"instructions\": " + json_counts(instructions) + ", \"by_role\": " + roles +
           ", \"wgmma\": " + json_map(wgmma) + ", \"bytes\": " + json_map(bytes) + "}";
}

}  // namespace sim
