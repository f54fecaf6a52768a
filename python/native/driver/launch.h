// Launches of any kernel on a given stream.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "driver/library.h"

namespace flash8 {

using Dim3 = std::array<std::int64_t, 3>;

struct LaunchShape {
    Dim3 grid{1, 1, 1};
    Dim3 block{1, 1, 1};
    Dim3 cluster{1, 1, 1};
    std::int64_t shared_bytes = 0;  // dynamic
    // Lets the kernel start before the one ahead of it in the stream has ended; it must then wait for that
    // one itself (griddepcontrol.wait).
    bool overlap_previous = false;
};

// The shape that the kernel's own KernelInfo asks for, over this grid.
LaunchShape shape_of(const KernelInfo& info, const Dim3& grid);

// One parameter of the kernel: the driver copies the bytes that it points to before launch() returns.
struct Parameter {
    const void* data;
    std::size_t bytes;
};

// Enqueues the kernel and returns. stream is a driver handle, such as torch's; 0 is the default stream.
// Throws std::invalid_argument for a shape that no device can run or parameters that do not fit KernelInfo,
// DriverError when the driver refuses.
void launch(Kernel& kernel, int device, std::uint64_t stream, const LaunchShape& shape,
            const std::vector<Parameter>& parameters);

}  // namespace flash8
