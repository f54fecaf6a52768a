// What the launches of all attention kernels check and describe alike. `call` is what errors name first:
// "forward", "backward". Everything throws std::invalid_argument.

#pragma once

#include <cstdint>

#include "attention/params.h"
#include "driver/tensor_map.h"

namespace flash8 {

// Limit of the rows of Q with query heads folded in, and of the rows of Q and K together, each plus a tile:
// the kernels count rows in 32 bits.
inline constexpr std::int64_t kMaxRows = 2147483647 - 1024;
// Below 2^31 by more than any grid: every persistent CTA claims one number past the last tile.
inline constexpr std::int64_t kMaxTiles = 2147483647 - (1 << 20);

// Rows of a page after which the swizzle of a tile repeats: TMA loads pages of a multiple of them.
inline constexpr std::int64_t kBoxRows = 8;

inline constexpr float kLog2E = 1.44269504088896340736f;

struct HeadCounts {
    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
};

void check_heads(const char* call, const HeadCounts& heads, const KernelInfo& info);
void check_sequences(const char* call, const SequenceParams& sequences);

// `value`, named `name`, counts elements: it is a multiple of the 16 bytes in which kernels access rows.
void check_row_unit(const char* call, const char* name, std::int64_t value, int element_bytes = 2);

// The same of a tensor's address and strides.
void check_rows_of(const char* call, const char* name, const TensorRef& tensor, int element_bytes = 2);

// position / page_size by a multiplication: exact for positions below 2^31.
void divide_by_page_size(PageParams& pages);

// A TensorRef as a (head_dim, row, head, batch) tensor. A tensor without rows may have no valid address. None
// of it is read, so one row `somewhere` in the call's memory takes its place.
TiledTensor tiled(const TensorRef& ref, std::int64_t head_dim, std::int64_t rows, std::int64_t heads,
                  std::int64_t batch, ElementType type, const void* somewhere);

// K or V of a cache as (head_dim, row, head, page), loaded in boxes of `pages.box_rows`. `box` is the
// kernel's.
TensorMap encode_pages(const Driver& driver, const TensorRef& ref, std::int64_t head_dim, std::int64_t heads,
                       const PageParams& pages, TmaBox box, const void* somewhere);

}  // namespace flash8
