#include "driver/launch.h"

#include <ostream>

#include "driver/context.h"
#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::int64_t kMaxThreads = 1024;
constexpr std::int64_t kMaxClusterCtas = 16;
constexpr std::int64_t kMaxSharedBytes = 227 * 1024;
constexpr std::size_t kMaxParameters = 64;
constexpr Dim3 kMaxGrid{2147483647, 65535, 65535};
constexpr Dim3 kMaxBlock{1024, 1024, 64};

struct Text {
    const Dim3& dim;
};

std::ostream& operator<<(std::ostream& stream, const Text& text) {
    return stream << '(' << text.dim[0] << ", " << text.dim[1] << ", " << text.dim[2] << ')';
}

std::int64_t product(const Dim3& dim) {
    return dim[0] * dim[1] * dim[2];
}

void check_range(const char* name, const Dim3& dim, const Dim3& limit) {
    for (std::size_t i = 0; i < 3; ++i) {
        require(dim[i] >= 1 && dim[i] <= limit[i], name, " is ", Text{dim}, "; supported are (1, 1, 1) to ",
                Text{limit});
    }
}

void check_cluster(const LaunchShape& shape) {
    check_range("cluster", shape.cluster, {kMaxClusterCtas, kMaxClusterCtas, kMaxClusterCtas});
    require(product(shape.cluster) <= kMaxClusterCtas, "cluster is ", Text{shape.cluster}, "; at most ",
            kMaxClusterCtas, " CTAs are supported");
    for (std::size_t i = 0; i < 3; ++i) {
        require(shape.grid[i] % shape.cluster[i] == 0, "grid is ", Text{shape.grid},
                "; it must be a multiple of the cluster, ", Text{shape.cluster});
    }
}

void check_shape(const LaunchShape& shape) {
    check_range("grid", shape.grid, kMaxGrid);
    check_range("block", shape.block, kMaxBlock);
    require(product(shape.block) <= kMaxThreads, "block is ", Text{shape.block}, "; at most ", kMaxThreads,
            " threads are supported");
    check_cluster(shape);
    require(shape.shared_bytes >= 0 && shape.shared_bytes <= kMaxSharedBytes, "shared_bytes is ",
            shape.shared_bytes, "; supported are 0 to ", kMaxSharedBytes);
}

void check_parameters(const Kernel& kernel, const std::vector<Parameter>& parameters) {
    require(parameters.size() <= kMaxParameters, "there are ", parameters.size(), " parameters; at most ",
            kMaxParameters, " are supported");
    if (!kernel.info()) {
        return;
    }
    const std::size_t wanted = kernel.info()->params_bytes;
    const std::size_t first = parameters.empty() ? 0 : parameters[0].bytes;
    require(parameters.size() == 1 && first == wanted, kernel.name(), " takes one parameter of ", wanted,
            " bytes, not ", parameters.size(), " parameter(s), the first of ", first, " bytes");
}

// The attributes of a launch, on the stack.
class Attributes {
  public:
    explicit Attributes(const LaunchShape& shape) {
        if (shape.cluster != Dim3{1, 1, 1}) {
            cu::LaunchAttribute& attribute = add(cu::kLaunchClusterDimension);
            attribute.value.cluster = {static_cast<unsigned>(shape.cluster[0]),
                                       static_cast<unsigned>(shape.cluster[1]),
                                       static_cast<unsigned>(shape.cluster[2])};
        }
        if (shape.overlap_previous) {
            add(cu::kLaunchProgrammaticStreamSerialization).value.flag = 1;
        }
    }

    cu::LaunchAttribute* data() { return attributes_.data(); }
    unsigned size() const { return size_; }

  private:
    cu::LaunchAttribute& add(cu::LaunchAttributeId id) {
        cu::LaunchAttribute& attribute = attributes_[size_++];
        attribute.id = id;
        return attribute;
    }

    std::array<cu::LaunchAttribute, 2> attributes_{};
    unsigned size_ = 0;
};

}  // namespace

LaunchShape shape_of(const KernelInfo& info, const Dim3& grid) {
    LaunchShape shape;
    shape.grid = grid;
    shape.block = {info.threads, 1, 1};
    shape.cluster = {info.cluster[0], info.cluster[1], info.cluster[2]};
    shape.shared_bytes = info.shared_bytes;
    return shape;
}

void launch(Kernel& kernel, int device, std::uint64_t stream, const LaunchShape& shape,
            const std::vector<Parameter>& parameters) {
    check_shape(shape);
    check_parameters(kernel, parameters);
    std::array<void*, kMaxParameters> pointers{};
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        pointers[i] = const_cast<void*>(parameters[i].data);
    }
    Attributes attributes(shape);
    const auto narrow = [](std::int64_t value) { return static_cast<unsigned>(value); };
    const cu::LaunchConfig config{narrow(shape.grid[0]),      narrow(shape.grid[1]),
                                  narrow(shape.grid[2]),      narrow(shape.block[0]),
                                  narrow(shape.block[1]),     narrow(shape.block[2]),
                                  narrow(shape.shared_bytes), reinterpret_cast<cu::Stream>(stream),
                                  attributes.data(),          attributes.size()};
    const Kernel::Needs needs{static_cast<int>(shape.shared_bytes), static_cast<int>(product(shape.cluster))};
    const ContextScope scope(kernel.driver(), device);
    const cu::Function function = kernel.function(device, needs);
    kernel.driver().call(&cu::Entries::launch_kernel_ex, &config, function, pointers.data(), nullptr);
}

}  // namespace flash8
