#include "errors.h"

#include <cstdarg>
#include <cstdio>

namespace sim {

const char* name_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kParse:
            return "parse";
        case ErrorKind::kUnsupported:
            return "unsupported";
        case ErrorKind::kInvalidValue:
            return "invalid-value";
        case ErrorKind::kOutOfBounds:
            return "out-of-bounds";
        case ErrorKind::kMisaligned:
            return "misaligned";
        case ErrorKind::kUninitialized:
            return "uninitialized";
        case ErrorKind::kDeadlock:
            return "deadlock";
        case ErrorKind::kRace:
            return "race";
        case ErrorKind::kProxyFence:
            return "proxy-fence";
        case ErrorKind::kWgmma:
            return "wgmma";
        case ErrorKind::kBarrier:
            return "barrier";
        case ErrorKind::kResources:
            return "resources";
        case ErrorKind::kClusterSize:
            return "cluster-size";
        case ErrorKind::kDivergence:
            return "divergence";
        case ErrorKind::kTrap:
            return "trap";
    }
    return "unknown";
}

std::string format(const char* pattern, ...) {
    char buffer[2048];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(buffer, sizeof buffer, pattern, arguments);
    va_end(arguments);
    return buffer;
}

}  // namespace sim
