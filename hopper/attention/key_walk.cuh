// The walk over a tile's KV blocks, from right to left, in the order in which the producer loads them.
//
//   [right_begin, end)       masked: the end of the keys, the diagonal, the right edge of the window
//   [left_end, right_begin)  unmasked
//   [begin, left_end)        masked: the left edge of the window
//
// Each stretch is a loop of its own, so that an unmasked block pays nothing for the mask.

#pragma once

#include "mask.cuh"

#include <type_traits>

namespace flash8 {

// Calls body(masked, n_block) for every block of the tile before `end`; `masked` is std::true_type or
// std::false_type. mask_all: the masked loop takes all of them.
//
// kMaskedRight: some of these blocks may need the mask of the right edge. Without a mask that is the last
// block alone, where the keys end; a caller that has peeled it gets no masked loop.
template <MaskMode kMask, bool kMaskedRight = true, class Body>
__device__ __forceinline__ void walk_key_blocks(KeyBlocks const& blocks, int end, bool mask_all,
                                                Body&& body) {
    int n_block = end;
    auto const walk = [&](auto masked, int begin) __attribute__((always_inline)) {
        while (n_block > begin) {
            --n_block;
            body(masked, n_block);
        }
    };
    if constexpr (kMaskedRight) {
        walk(std::true_type{}, mask_all ? blocks.begin : max(blocks.right_begin, blocks.begin));
    }
    walk(std::false_type{}, max(blocks.begin, blocks.left_end));
    if constexpr (kMask == MaskMode::kLocal) {
        walk(std::true_type{}, blocks.begin);
    }
}

}  // namespace flash8
