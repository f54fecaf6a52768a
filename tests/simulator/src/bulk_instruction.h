// What the decoder of bulk copies (bulk_decode.cpp) hands to their handlers (bulk_copy.cpp).
#pragma once

#include "bulk_copy.h"
#include "program.h"

namespace sim {

// The operands of a copy in Program::lists, at fixed places; addresses take three entries.
enum BulkPlace : uint32_t {
    kTo = 0,
    kFrom = 3,
    kBarrier = 6,
    kMap = 9,
    kSize = 12,
    kMask = 13,
    kCoordinates = 14,
    kPlaces = 19
};
enum BulkKind : uint16_t { kLoad, kStore, kSharedToShared };
constexpr uint32_t kReduces = 1, kTiled = 2, kMulticast = 4;  // op.target

Step issue_bulk(Warp& warp, const Op& op, uint32_t mask);
Step commit_bulk(Warp& warp, const Op& op, uint32_t mask);
Step wait_bulk(Warp& warp, const Op& op, uint32_t mask);

}  // namespace sim
