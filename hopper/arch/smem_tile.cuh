// Tiles in shared memory as operands of wgmma. CuTe's partition_fragment_A and _B find the same descriptors
// by the algebra of layouts, which is half of a compilation; for tiles that TMA writes it is arithmetic.

#pragma once

#include "../kernel_info.h"
#include "ptx.cuh"
#include "swizzled_tile.cuh"

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor_impl.hpp>

namespace flash8 {

// kCount tiles one behind the other, each of kColumns / kPanel panels of kRows rows. A row of a panel is
// contiguous and swizzled over its length, as TMA writes it.
template <class Element, int kPanel, int kRows, int kColumns, int kCount = 1>
class SmemTile {
    static constexpr int kUnit = 16;  // bytes: descriptors count in these
    static constexpr int kRowUnits = kPanel * sizeof(Element) / kUnit;
    static constexpr int kPanelUnits = kRows * kRowUnits;
    static constexpr int kPanels = kColumns / kPanel;
    static constexpr int kGroupUnits = 8 * kRowUnits;  // eight rows, after which the swizzle repeats
    static_assert(kRowUnits == 2 || kRowUnits == 4 || kRowUnits == 8, "a swizzle of 32, 64 or 128 bytes");
    static_assert(kColumns % kPanel == 0 && kRows % 8 == 0);

    template <int... kSizes>
    using Ints = cute::Shape<cute::Int<kSizes>...>;

  public:
    static constexpr Swizzle kSwizzle = kRowUnits == 8   ? Swizzle::k128B
                                        : kRowUnits == 4 ? Swizzle::k64B
                                                         : Swizzle::k32B;

    // K-major: k runs along the rows. kTiles operands of kTaken rows each, from `row` on.
    // (MMA, MMA_M or MMA_N, MMA_K, tile)
    template <int kTaken, int kTiles = 1>
    __device__ __forceinline__ static auto by_rows(Element const* tiles, int row = 0) {
        constexpr int kSteps = kRowUnits / 2;  // of 32 bytes
        using Sizes = cute::Shape<cute::_1, cute::Int<kTiles>, Ints<kSteps, kPanels>, cute::Int<kCount>>;
        using Strides = cute::Stride<cute::_0, cute::Int<kTaken * kRowUnits>, Ints<2, kPanelUnits>,
                                     cute::Int<kPanels * kPanelUnits>>;
        static_assert(kTaken % 8 == 0 && kTaken * kTiles <= kRows);
        return cute::make_tensor(descriptor(tiles + row * kPanel, 1), cute::Layout<Sizes, Strides>{});
    }

    // MN-major, 16 bits: k runs over the rows. An operand of kTaken columns from `column` on, whole panels.
    // (MMA, MMA_M or MMA_N, MMA_K, tile)
    template <int kTaken>
    __device__ __forceinline__ static auto by_columns(Element const* tiles, int column = 0) {
        using Sizes = Ints<1, 1, kRows / 16, kCount>;
        using Strides =
            cute::Stride<cute::_0, cute::_0, cute::Int<16 * kRowUnits>, cute::Int<kPanels * kPanelUnits>>;
        static_assert(sizeof(Element) == 2 && kRows % 16 == 0 && kTaken % kPanel == 0);
        constexpr int kNextPanel = kTaken == kPanel ? 0 : kPanelUnits;
        return cute::make_tensor(descriptor(tiles + column * kRows, kNextPanel),
                                 cute::Layout<Sizes, Strides>{});
    }

  private:
    // leading: from one panel to the next; not used in an operand that is K-major.
    __device__ __forceinline__ static auto descriptor(Element const* start, int leading) {
        using cute::SM90::GMMA::LayoutType;
        constexpr auto kLayout = kRowUnits == 8   ? LayoutType::B128
                                 : kRowUnits == 4 ? LayoutType::B64
                                                  : LayoutType::B32;
        cute::GmmaDescriptor fields;
        fields.bitfield.layout_type_ = static_cast<uint8_t>(kLayout);
        fields.bitfield.start_address_ = static_cast<uint16_t>(ptx::shared_address(start) / kUnit);
        fields.bitfield.stride_byte_offset_ = kGroupUnits;
        fields.bitfield.leading_byte_offset_ = static_cast<uint16_t>(leading);
        return cute::SM90::GMMA::DescriptorIterator{fields};
    }
};

}  // namespace flash8
