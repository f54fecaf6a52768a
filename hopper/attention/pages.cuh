// Where the keys of a paged cache are.

#pragma once

#include "params.h"

namespace flash8 {

struct KeyPlace {
    int page;  // may not exist: num_pages, and whatever the table says
    int row;
};

// The place of the keys of a table row from `position` on. What no query sees is in no page, and its entry of
// the table is not read: that page may have been freed.
__device__ __forceinline__ KeyPlace look_up_page(PageParams const& pages, int table_row, int position,
                                                 bool seen) {
    uint64_t const product = static_cast<uint64_t>(position) * pages.page_multiplier;
    int const index = static_cast<int>(product >> pages.page_shift);
    int page = pages.num_pages;
    if (seen && index < pages.max_pages) {
        page = pages.page_table[table_row * pages.page_table_stride + index];
    }
    return {page, position - index * pages.page_size};
}

}  // namespace flash8
