// The walk over the blocks of queries of a block of keys, for every query head of the tile, in the order in
// which the producer loads them.
//
//   [begin, left_end)        masked: the diagonal, the left edge of the window, the last keys
//   [left_end, right_begin)  unmasked
//   [right_begin, end)       masked: the right edge of the window

#pragma once

#include "key_tile.cuh"
#include "probabilities.cuh"

#include <type_traits>

namespace flash8 {

// Calls step(masked, first, m_block) for every block; both are std::true_type or std::false_type, and only
// the first call of all is a first one. next_head(g, blocks) comes between the blocks of two heads of the
// group.
template <MaskMode kMask, class Step, class NextHead>
__device__ __forceinline__ void walk_query_blocks(KeyTile const& tile, Step&& step, NextHead&& next_head) {
    int m_block = tile.blocks.begin;
    int const end = tile.blocks.end;
    int const unmasked_end = kMask == MaskMode::kLocal ? tile.blocks.right_begin : end;
    step(std::true_type{}, std::true_type{}, m_block);
    ++m_block;
#pragma unroll 1
    for (int g = tile.group;;) {
#pragma unroll 1
        for (; m_block < tile.blocks.left_end; ++m_block) {
            step(std::true_type{}, std::false_type{}, m_block);
        }
#pragma unroll 1
        for (; m_block < unmasked_end; ++m_block) {
            step(std::false_type{}, std::false_type{}, m_block);
        }
        if constexpr (kMask == MaskMode::kLocal) {
#pragma unroll 1
            for (; m_block < end; ++m_block) {
                step(std::true_type{}, std::false_type{}, m_block);
            }
        }
        if (--g == 0) {
            break;
        }
        m_block = read_again(tile.blocks.begin);
        next_head(tile.group - g, end - m_block);
    }
}

}  // namespace flash8
