#include "launch_checks.h"

#include "errors.h"

namespace sim {
namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr Dim3 kMaxBlock{1024, 1024, 64};
constexpr Dim3 kMaxGrid{0x7fffffff, 65535, 65535};
constexpr uint64_t kPortableCluster = 8, kMaxCluster = 16;

[[noreturn]] void refuse(ErrorKind kind, const Kernel& kernel, const std::string& message) {
    throw SimError(kind, "kernel " + kernel.name + ": " + message);
}

bool same(const Dim3& a, const Dim3& b) {
    return a.x == b.x && a.y == b.y && a.z == b.z;
}

bool within(const Dim3& a, const Dim3& most) {
    return a.x <= most.x && a.y <= most.y && a.z <= most.z;
}

std::string text_of(const Dim3& d) {
    return format("(%u, %u, %u)", d.x, d.y, d.z);
}

const std::vector<uint32_t>* directive(const Kernel& kernel, const char* name) {
    const auto found = kernel.ast.directives.find(name);
    return found == kernel.ast.directives.end() ? nullptr : &found->second;
}

void check_block(const Launch& launch) {
    const Kernel& kernel = *launch.kernel;
    const uint64_t threads = launch.block.count();
    if (launch.grid.count() == 0 || threads == 0 || launch.cluster.count() == 0) {
        refuse(ErrorKind::kInvalidValue, kernel, "a grid, block or cluster dimension is 0");
    }
    if (threads > kMaxThreads || !within(launch.block, kMaxBlock)) {
        refuse(ErrorKind::kInvalidValue, kernel,
               format("a block of %s threads; at most %s, and %u together", text_of(launch.block).c_str(),
                      text_of(kMaxBlock).c_str(), kMaxThreads));
    }
    if (!within(launch.grid, kMaxGrid)) {
        refuse(ErrorKind::kInvalidValue, kernel,
               format("a grid of %s blocks; at most %s", text_of(launch.grid).c_str(),
                      text_of(kMaxGrid).c_str()));
    }
    if (threads > kernel.max_threads) {
        refuse(ErrorKind::kResources, kernel,
               format("%llu threads a block, at most %u", static_cast<unsigned long long>(threads),
                      kernel.max_threads));
    }
    if (const auto* required = directive(kernel, "reqntid")) {
        Dim3 fixed;
        uint32_t* extents[] = {&fixed.x, &fixed.y, &fixed.z};
        for (size_t i = 0; i < required->size() && i < 3; ++i) {
            *extents[i] = (*required)[i];
        }
        if (!same(launch.block, fixed)) {
            refuse(ErrorKind::kInvalidValue, kernel,
                   format("a block of %s threads, but .reqntid says %s", text_of(launch.block).c_str(),
                          text_of(fixed).c_str()));
        }
    }
}

// A module refuses static shared memory beyond 227 KB, cuFuncSetAttribute what does not fit beside it.
void check_shared(const Launch& launch) {
    const Kernel& kernel = *launch.kernel;
    if (launch.dynamic_shared > kernel.max_dynamic_shared) {
        refuse(ErrorKind::kInvalidValue, kernel,
               format("%u bytes of dynamic shared memory need "
                      "cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES), which says %u",
                      launch.dynamic_shared, kernel.max_dynamic_shared));
    }
}

void check_cluster(const Launch& launch) {
    const Kernel& kernel = *launch.kernel;
    const uint64_t ctas = launch.cluster.count();
    if (ctas > kMaxCluster || (ctas > kPortableCluster && !kernel.non_portable_cluster)) {
        refuse(ErrorKind::kClusterSize, kernel,
               format("a cluster of %llu CTAs (8 are portable, 16 with "
                      "cuFuncSetAttribute(NON_PORTABLE_CLUSTER_SIZE_ALLOWED))",
                      static_cast<unsigned long long>(ctas)));
    }
    const auto* most = directive(kernel, "maxclusterrank");
    if (most != nullptr && !most->empty() && ctas > most->front()) {
        refuse(ErrorKind::kClusterSize, kernel,
               format("a cluster of %llu CTAs, but .maxclusterrank says %u",
                      static_cast<unsigned long long>(ctas), most->front()));
    }
    if (launch.grid.x % launch.cluster.x != 0 || launch.grid.y % launch.cluster.y != 0 ||
        launch.grid.z % launch.cluster.z != 0) {
        refuse(ErrorKind::kClusterSize, kernel,
               format("the grid %s is no multiple of the cluster %s", text_of(launch.grid).c_str(),
                      text_of(launch.cluster).c_str()));
    }
}

}  // namespace

void choose_cluster(Launch& launch, const Dim3* asked) {
    const Kernel& kernel = *launch.kernel;
    const uint32_t* required = kernel.required_cluster;
    if (required[0] != 0) {
        const Dim3 fixed{required[0], required[1], required[2]};
        if (asked != nullptr && !same(*asked, fixed)) {
            refuse(ErrorKind::kClusterSize, kernel,
                   format("the launch's cluster %s is not the kernel's .reqnctapercluster %s",
                          text_of(*asked).c_str(), text_of(fixed).c_str()));
        }
        launch.cluster = fixed;
        return;
    }
    if (asked == nullptr && directive(kernel, "explicitcluster") != nullptr) {
        refuse(ErrorKind::kClusterSize, kernel, ".explicitcluster needs a launch that names its cluster");
    }
    launch.cluster = asked != nullptr ? *asked : Dim3{};
}

void check_limits(const Launch& launch) {
    check_block(launch);
    check_shared(launch);
    check_cluster(launch);
}

}  // namespace sim
