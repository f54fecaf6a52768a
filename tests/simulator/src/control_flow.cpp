#include "control_flow.h"

#include <algorithm>

namespace sim {
namespace {

bool ends_block(const InstructionAst& instruction) {
    return instruction.opcode == "bra" || instruction.opcode == "exit" || instruction.opcode == "ret";
}

bool falls_through(const InstructionAst& instruction) {
    return !ends_block(instruction) || instruction.guard >= 0;
}

std::vector<bool> find_leaders(const KernelAst& kernel) {
    const size_t count = kernel.instructions.size();
    std::vector<bool> leader(count + 1, false);
    leader[0] = true;
    for (const auto& label : kernel.labels) {
        leader[static_cast<size_t>(label.second)] = true;
    }
    for (size_t i = 0; i < count; ++i) {
        if (ends_block(kernel.instructions[i])) {
            leader[i + 1] = true;
        }
    }
    return leader;
}

// Immediate post-dominators by iteration over the reversed graph (Cooper, Harvey, Kennedy).
class PostDominators {
  public:
    explicit PostDominators(const std::vector<Block>& blocks)
        : blocks_(blocks), exit_(static_cast<int>(blocks.size())), order_(blocks.size() + 1, -1) {}

    std::vector<int> run() {
        number_from_exit();
        std::vector<int> parent(blocks_.size() + 1, -1);
        parent[static_cast<size_t>(exit_)] = exit_;
        bool changed = true;
        while (changed) {
            changed = false;
            for (int block : sequence_) {
                if (block == exit_) {
                    continue;
                }
                const int best = meet_successors(block, parent);
                if (best != parent[static_cast<size_t>(block)]) {
                    parent[static_cast<size_t>(block)] = best;
                    changed = true;
                }
            }
        }
        return parent;
    }

  private:
    void number_from_exit() {
        std::vector<std::vector<int>> predecessors(blocks_.size() + 1);
        for (size_t b = 0; b < blocks_.size(); ++b) {
            for (int s : blocks_[b].successors) {
                predecessors[static_cast<size_t>(s)].push_back(static_cast<int>(b));
            }
        }
        std::vector<bool> seen(blocks_.size() + 1, false);
        std::vector<std::pair<int, size_t>> stack = {{exit_, 0}};
        seen[static_cast<size_t>(exit_)] = true;
        std::vector<int> postorder;
        while (!stack.empty()) {
            auto& [node, next] = stack.back();
            const auto& edges = predecessors[static_cast<size_t>(node)];
            if (next < edges.size()) {
                const int target = edges[next++];
                if (!seen[static_cast<size_t>(target)]) {
                    seen[static_cast<size_t>(target)] = true;
                    stack.push_back({target, 0});
                }
            } else {
                postorder.push_back(node);
                stack.pop_back();
            }
        }
        sequence_.assign(postorder.rbegin(), postorder.rend());
        for (size_t i = 0; i < sequence_.size(); ++i) {
            order_[static_cast<size_t>(sequence_[i])] = static_cast<int>(i);
        }
    }

    int meet_successors(int block, const std::vector<int>& parent) const {
        int best = -1;
        for (int s : blocks_[static_cast<size_t>(block)].successors) {
            if (parent[static_cast<size_t>(s)] < 0) {
                continue;
            }
            best = best < 0 ? s : meet(best, s, parent);
        }
        return best;
    }

    int meet(int a, int b, const std::vector<int>& parent) const {
        while (a != b) {
            while (order_[static_cast<size_t>(a)] > order_[static_cast<size_t>(b)]) {
                a = parent[static_cast<size_t>(a)];
            }
            while (order_[static_cast<size_t>(b)] > order_[static_cast<size_t>(a)]) {
                b = parent[static_cast<size_t>(b)];
            }
        }
        return a;
    }

    const std::vector<Block>& blocks_;
    int exit_;
    std::vector<int> order_;  // position from the exit; -1 when the exit is out of reach
    std::vector<int> sequence_;
};

}  // namespace

ControlFlow build_control_flow(const KernelAst& kernel) {
    ControlFlow flow;
    const int count = static_cast<int>(kernel.instructions.size());
    const std::vector<bool> leader = find_leaders(kernel);
    flow.block_of.resize(static_cast<size_t>(count) + 1);
    for (int i = 0; i < count; ++i) {
        if (leader[static_cast<size_t>(i)]) {
            flow.blocks.push_back({i, i, {}});
        }
        flow.blocks.back().end = i + 1;
        flow.block_of[static_cast<size_t>(i)] = static_cast<int>(flow.blocks.size()) - 1;
    }
    const int exit = static_cast<int>(flow.blocks.size());
    flow.block_of[static_cast<size_t>(count)] = exit;
    for (Block& block : flow.blocks) {
        const InstructionAst& last = kernel.instructions[static_cast<size_t>(block.end) - 1];
        if (last.opcode == "bra") {
            const int target = kernel.labels.at(last.operands[0].name);
            block.successors.push_back(flow.block_of[static_cast<size_t>(target)]);
        } else if (ends_block(last)) {
            block.successors.push_back(exit);
        }
        if (falls_through(last)) {
            block.successors.push_back(flow.block_of[static_cast<size_t>(block.end)]);
        }
    }
    const std::vector<int> parent = PostDominators(flow.blocks).run();
    for (size_t b = 0; b < flow.blocks.size(); ++b) {
        const int p = parent[b];
        flow.reconvergence.push_back(p < 0 || p == exit ? -1 : flow.blocks[static_cast<size_t>(p)].begin);
    }
    return flow;
}

}  // namespace sim
