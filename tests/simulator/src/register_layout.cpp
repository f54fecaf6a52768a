// Which registers an instruction touches, which are live where, and who may share a slot.
// PTX from a compiler names each value anew (13,000 registers in an attention kernel); packed by
// live ranges a warp needs some hundreds, and they stay in the host's cache.
#include <algorithm>
#include <set>
#include <unordered_set>

#include "control_flow.h"

namespace sim {
namespace {

bool writes_nothing(const InstructionAst& in) {
    static const std::unordered_set<std::string> none = {
        "st",         "red",           "bra",      "bar",       "barrier",  "exit",
        "ret",        "trap",          "brkpt",    "fence",     "membar",   "cp",
        "setmaxnreg", "nanosleep",     "prefetch", "prefetchu", "stmatrix", "griddepcontrol",
        "discard",    "applypriority", "wgmma",    "call",      "pmevent",  "tensormap"};
    if (in.opcode == "bar" || in.opcode == "barrier") {
        return !in.has("red");
    }
    if (none.count(in.opcode) != 0) {
        return true;
    }
    return !in.operands.empty() && in.operands[0].kind == Operand::kAddress;
}

void collect(const Operand& operand, std::vector<int>& registers) {
    if (operand.kind == Operand::kRegister) {
        registers.push_back(operand.reg);
    }
    for (const Operand& element : operand.elements) {
        collect(element, registers);
    }
}

// What a wgmma reads and writes stays its own until the next wait_group: those registers may not be
// shared with anything before it.
void add_wgmma_uses(const KernelAst& kernel, const ControlFlow& flow, std::vector<Roles>& roles) {
    std::vector<std::set<int>> in_flight(flow.blocks.size() + 1);
    bool changed = true;
    const auto walk = [&](size_t b, bool record) {
        std::set<int> now = in_flight[b];
        for (int i = flow.blocks[b].begin; i < flow.blocks[b].end; ++i) {
            const InstructionAst& in = kernel.instructions[static_cast<size_t>(i)];
            if (in.opcode != "wgmma") {
                continue;
            }
            Roles& role = roles[static_cast<size_t>(i)];
            if (in.has("mma_async")) {
                now.insert(role.reads.begin(), role.reads.end());
            } else if (in.has("wait_group")) {
                if (record) {
                    role.reads.insert(role.reads.end(), now.begin(), now.end());
                }
                if (!in.operands.empty() && in.operands[0].bits == 0) {
                    now.clear();
                }
            }
        }
        return now;
    };
    while (changed) {
        changed = false;
        for (size_t b = 0; b < flow.blocks.size(); ++b) {
            const std::set<int> out = walk(b, false);
            for (int s : flow.blocks[b].successors) {
                std::set<int>& target = in_flight[static_cast<size_t>(s)];
                const size_t before = target.size();
                target.insert(out.begin(), out.end());
                changed = changed || target.size() != before;
            }
        }
    }
    for (size_t b = 0; b < flow.blocks.size(); ++b) {
        walk(b, true);
    }
}

using Bits = std::vector<uint64_t>;

class Liveness {
  public:
    Liveness(const KernelAst& kernel, const ControlFlow& flow, const std::vector<Roles>& roles)
        : kernel_(kernel), flow_(flow), roles_(roles), words_((kernel.registers.size() + 63) / 64) {}

    // First and last instruction at which each register is live.
    std::vector<std::pair<int, int>> run() {
        solve();
        std::vector<std::pair<int, int>> ranges(kernel_.registers.size(), {-1, -1});
        const auto extend = [&](int reg, int at) {
            auto& range = ranges[static_cast<size_t>(reg)];
            range.first = range.first < 0 ? at : std::min(range.first, at);
            range.second = std::max(range.second, at);
        };
        // What may be read before it is written keeps a slot of its own, so that the checker can tell.
        for_each(live_in_[0], [&](int reg) {
            extend(reg, 0);
            extend(reg, static_cast<int>(kernel_.instructions.size()));
        });
        for (size_t b = 0; b < flow_.blocks.size(); ++b) {
            for_each(live_in_[b], [&](int reg) { extend(reg, flow_.blocks[b].begin); });
            for_each(live_out_[b], [&](int reg) { extend(reg, flow_.blocks[b].end - 1); });
            for (int i = flow_.blocks[b].begin; i < flow_.blocks[b].end; ++i) {
                const Roles& role = roles_[static_cast<size_t>(i)];
                for (int reg : role.reads) {
                    extend(reg, i);
                }
                for (int reg : role.writes) {
                    extend(reg, i);
                }
            }
        }
        return ranges;
    }

  private:
    template <class F>
    static void for_each(const Bits& bits, F f) {
        for (size_t word = 0; word < bits.size(); ++word) {
            for (uint64_t rest = bits[word]; rest != 0; rest &= rest - 1) {
                f(static_cast<int>(word * 64) + __builtin_ctzll(rest));
            }
        }
    }

    void solve() {
        const size_t count = flow_.blocks.size();
        live_in_.assign(count + 1, Bits(words_));
        live_out_.assign(count, Bits(words_));
        std::vector<Bits> use(count, Bits(words_)), def(count, Bits(words_));
        for (size_t b = 0; b < count; ++b) {
            for (int i = flow_.blocks[b].begin; i < flow_.blocks[b].end; ++i) {
                const Roles& role = roles_[static_cast<size_t>(i)];
                for (int reg : role.reads) {
                    if (!test(def[b], reg)) {
                        set(use[b], reg);
                    }
                }
                const bool whole = kernel_.instructions[static_cast<size_t>(i)].guard < 0;
                for (int reg : role.writes) {
                    if (whole) {
                        set(def[b], reg);
                    }
                }
            }
        }
        bool changed = true;
        while (changed) {
            changed = false;
            for (size_t b = count; b-- > 0;) {
                for (int s : flow_.blocks[b].successors) {
                    for (size_t w = 0; w < words_; ++w) {
                        live_out_[b][w] |= live_in_[static_cast<size_t>(s)][w];
                    }
                }
                for (size_t w = 0; w < words_; ++w) {
                    const uint64_t in = use[b][w] | (live_out_[b][w] & ~def[b][w]);
                    changed = changed || in != live_in_[b][w];
                    live_in_[b][w] = in;
                }
            }
        }
    }

    static bool test(const Bits& bits, int reg) {
        return ((bits[static_cast<size_t>(reg) / 64] >> (reg % 64)) & 1) != 0;
    }
    static void set(Bits& bits, int reg) { bits[static_cast<size_t>(reg) / 64] |= uint64_t{1} << (reg % 64); }

    const KernelAst& kernel_;
    const ControlFlow& flow_;
    const std::vector<Roles>& roles_;
    size_t words_;
    std::vector<Bits> live_in_, live_out_;
};

}  // namespace

Roles roles_of(const InstructionAst& in) {
    Roles roles;
    if (in.guard >= 0) {
        roles.reads.push_back(in.guard);
    }
    const bool accumulates = in.opcode == "wgmma" && in.has("mma_async");
    for (size_t i = 0; i < in.operands.size(); ++i) {
        if (i == 0 && !writes_nothing(in)) {
            collect(in.operands[i], roles.writes);
            continue;
        }
        collect(in.operands[i], roles.reads);
        if (i == 0 && accumulates) {
            collect(in.operands[i], roles.writes);
        }
    }
    return roles;
}

RegisterLayout allocate_registers(const KernelAst& kernel, const ControlFlow& flow, uint32_t* register_bytes,
                                  uint32_t* predicate_count) {
    std::vector<Roles> roles;
    for (const InstructionAst& in : kernel.instructions) {
        roles.push_back(roles_of(in));
    }
    add_wgmma_uses(kernel, flow, roles);
    const auto ranges = Liveness(kernel, flow, roles).run();

    std::vector<int> order;
    for (size_t r = 0; r < ranges.size(); ++r) {
        if (ranges[r].first >= 0) {
            order.push_back(static_cast<int>(r));
        }
    }
    std::sort(order.begin(), order.end(), [&](int a, int b) {
        return ranges[static_cast<size_t>(a)].first < ranges[static_cast<size_t>(b)].first;
    });

    RegisterLayout layout(kernel.registers.size(), kNone);
    std::map<int, std::vector<uint32_t>> free_slots;  // by width
    std::set<std::pair<int, int>> active;             // (last use, register)
    *register_bytes = 0;
    *predicate_count = kFirstPred + 1;  // one more for the carry flag
    for (int reg : order) {
        const auto& range = ranges[static_cast<size_t>(reg)];
        while (!active.empty() && active.begin()->first < range.first) {
            const int done = active.begin()->second;
            free_slots[kernel.registers[static_cast<size_t>(done)].width].push_back(
                layout[static_cast<size_t>(done)]);
            active.erase(active.begin());
        }
        const int width = kernel.registers[static_cast<size_t>(reg)].width;
        std::vector<uint32_t>& slots = free_slots[width];
        if (!slots.empty()) {
            layout[static_cast<size_t>(reg)] = slots.back();
            slots.pop_back();
        } else if (width == 1) {
            layout[static_cast<size_t>(reg)] = (*predicate_count)++;
        } else {
            layout[static_cast<size_t>(reg)] = *register_bytes;
            *register_bytes += static_cast<uint32_t>(width) * 4;  // 32 lanes
        }
        active.insert({range.second, reg});
    }
    return layout;
}

}  // namespace sim
