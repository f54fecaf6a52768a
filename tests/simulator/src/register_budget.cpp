#include "register_budget.h"

#include <algorithm>

namespace sim {
namespace {

constexpr uint32_t kMultiprocessorRegisters = 64 * 1024;
constexpr uint32_t kMost = 255;          // of a thread, as an instruction can name them
constexpr uint32_t kStep = 8;            // of a thread: a warp has them in blocks of 256
constexpr uint32_t kWarpPartitions = 4;  // of a multiprocessor, with a quarter of its registers each

// The product of a directive's values; 0 when the kernel does not have it.
uint32_t directive(const Kernel& kernel, const char* name) {
    const auto found = kernel.ast.directives.find(name);
    if (found == kernel.ast.directives.end() || found->second.empty()) {
        return 0;
    }
    uint32_t product = 1;
    for (const uint32_t value : found->second) {
        product *= value;
    }
    return product;
}

// No warp starts with more than an inc asks for.
uint32_t smallest_increase(const Program& program) {
    uint32_t smallest = kMost;
    for (size_t i = 0; i < program.ops.size(); ++i) {
        if (program.names[i].rfind("setmaxnreg.inc", 0) == 0) {
            smallest = std::min(smallest, static_cast<uint32_t>(program.ops[i].imm));
        }
    }
    return smallest;
}

uint32_t round_up(uint32_t value, uint32_t step) {
    return (value + step - 1) / step * step;
}

}  // namespace

uint32_t registers_at_launch(const Kernel& kernel) {
    uint32_t most = directive(kernel, "maxnreg");
    if (most == 0) {
        const uint32_t threads = std::max(directive(kernel, "maxntid"), directive(kernel, "reqntid"));
        const uint32_t ctas = directive(kernel, "minnctapersm");
        if (threads == 0 || ctas == 0) {
            return 0;
        }
        const uint32_t warps = round_up(ctas * ((threads + kLanes - 1) / kLanes), kWarpPartitions);
        most = kMultiprocessorRegisters / (warps * kLanes) / kStep * kStep;
    }
    return std::min({most, kMost, smallest_increase(kernel.program)});
}

}  // namespace sim
