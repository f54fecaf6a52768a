#include "written_bytes.h"

#include <algorithm>

namespace sim {
namespace {

// The bits [first, first + count) of a word.
uint64_t bits(uint64_t first, uint64_t count) {
    return (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
}

}  // namespace

void WrittenBytes::set(uint64_t address, uint64_t bytes, bool written) {
    uint64_t at = address - begin_;
    const uint64_t end = at + bytes;
    while (at < end) {
        const uint64_t count = std::min(end - at, 64 - at % 64);
        const uint64_t mask = bits(at % 64, count);
        std::atomic<uint64_t>& word = words_[at / 64];
        const uint64_t old = word.load(std::memory_order_relaxed);
        if (written && (old & mask) != mask) {
            word.fetch_or(mask, std::memory_order_relaxed);
        } else if (!written) {
            word.fetch_and(~mask, std::memory_order_relaxed);
        }
        at += count;
    }
}

uint64_t WrittenBytes::first_unwritten(uint64_t address, uint64_t bytes) const {
    uint64_t at = address - begin_;
    const uint64_t end = at + bytes;
    while (at < end) {
        const uint64_t count = std::min(end - at, 64 - at % 64);
        const uint64_t missing = bits(at % 64, count) & ~words_[at / 64].load(std::memory_order_relaxed);
        if (missing != 0) {
            return begin_ + at / 64 * 64 + static_cast<uint64_t>(__builtin_ctzll(missing));
        }
        at += count;
    }
    return begin_ + end;
}

}  // namespace sim
