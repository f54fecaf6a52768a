// Descriptors of a tile that all iterations read.

#pragma once

#include <cute/tensor_impl.hpp>

namespace flash8 {

// The fragment of one stage. `nothing` is zero, which the compiler must not know: of descriptors that are
// always the same it would make vector registers, dozens of them, before the loop.
template <class Fragment>
__device__ __forceinline__ auto made_anew(Fragment const& fragment, int nothing, int stage_of_ring = 0) {
    auto const whole = fragment(cute::_, cute::_, cute::_, stage_of_ring);
    return cute::make_tensor(whole.data() + nothing, whole.layout());
}

}  // namespace flash8
