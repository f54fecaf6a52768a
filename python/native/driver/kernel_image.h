// What the host reads out of a compiled kernel before the driver sees it.

#pragma once

#include <string>

namespace flash8 {

// The bytes of the constant `kernel_info` of an image: of the initial data of a cubin (an ELF file), or of
// the initialiser in PTX. Empty if there is none, or if the image is neither. Asking the driver for them
// takes a copy from the device, which waits for it and would spoil a CUDA graph that is being captured.
//
// Throws std::invalid_argument for a cubin that is cut off or whose tables point outside it: the driver is
// handed no length and would read on.
std::string kernel_info_bytes(const std::string& image);

}  // namespace flash8
