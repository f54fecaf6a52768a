// How TMA lays a tile into shared memory, and what wgmma then reads.

#pragma once

#include "../kernel_info.h"
#include "swizzled_tile.cuh"

#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace flash8 {

template <class Element, int kPanelBytes>
struct SwizzleAtoms;
template <class Element>
struct SwizzleAtoms<Element, 128> {
    using KMajor = cute::GMMA::Layout_K_SW128_Atom<Element>;
    using MnMajor = cute::GMMA::Layout_MN_SW128_Atom<Element>;
    static constexpr Swizzle kSwizzle = Swizzle::k128B;
};
template <class Element>
struct SwizzleAtoms<Element, 64> {
    using KMajor = cute::GMMA::Layout_K_SW64_Atom<Element>;
    using MnMajor = cute::GMMA::Layout_MN_SW64_Atom<Element>;
    static constexpr Swizzle kSwizzle = Swizzle::k64B;
};
template <class Element>
struct SwizzleAtoms<Element, 32> {
    using KMajor = cute::GMMA::Layout_K_SW32_Atom<Element>;
    using MnMajor = cute::GMMA::Layout_MN_SW32_Atom<Element>;
    static constexpr Swizzle kSwizzle = Swizzle::k32B;
};

}  // namespace flash8
