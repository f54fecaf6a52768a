// The one exception of the simulator: what went wrong, in words a kernel author can act on.
#pragma once

#include <stdexcept>
#include <string>

namespace sim {

enum class ErrorKind {
    kParse,         // malformed PTX, unknown instruction or form
    kUnsupported,   // a legal thing this engine does not model
    kInvalidValue,  // a wrong argument of a driver entry or an instruction
    kOutOfBounds,   // access outside every known allocation
    kMisaligned,
    kUninitialized,  // shared memory or registers nobody wrote
    kDeadlock,
    kRace,
    kProxyFence,  // generic write reaches the async proxy without fence.proxy.async
    kWgmma,       // accumulator, operand or fence rules of wgmma
    kBarrier,     // arrival counts, tx-counts, named-barrier misuse
    kResources,   // registers, threads
    kClusterSize,
    kDivergence,  // .aligned executed by part of a warp
    kTrap,
};

const char* name_of(ErrorKind kind);

class SimError : public std::runtime_error {
  public:
    SimError(ErrorKind kind, const std::string& message, int line = 0)
        : std::runtime_error(message), kind_(kind), line_(line) {}

    ErrorKind kind() const { return kind_; }
    int line() const { return line_; }

  private:
    ErrorKind kind_;
    int line_;
};

// printf into a std::string, for messages.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace sim
