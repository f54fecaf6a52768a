// What the checker remembers of each 4-byte word of shared memory.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace sim {

// Who touched a word, when by that agent's own clock, and at which PTX line: 12 + 28 + 24 bits.
using Epoch = uint64_t;
inline Epoch make_epoch(uint32_t agent, uint32_t time, int line) {
    return (uint64_t{agent} << 52) | (uint64_t{time & 0xfffffffu} << 24) |
           (static_cast<uint32_t>(line) & 0xffffffu);
}
inline uint32_t agent_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 52);
}
inline uint32_t time_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 24) & 0xfffffffu;
}
inline int line_of(Epoch epoch) {
    return static_cast<int>(epoch & 0xffffffu);
}

constexpr uint8_t kMbarrierWord = 0x10;  // in SharedShadow::written: part of a live mbarrier

struct SharedShadow {
    static constexpr size_t kReaders = 4;
    std::vector<uint8_t> written;  // a bit per byte, and kMbarrierWord
    std::vector<Epoch> writer;
    std::array<std::vector<Epoch>, kReaders> readers;

    void allocate(uint32_t bytes, bool with_epochs) {
        const size_t words = (bytes + 3) / 4;
        written.assign(words, 0);
        if (!with_epochs) {
            return;
        }
        writer.assign(words, 0);
        for (std::vector<Epoch>& slot : readers) {
            slot.assign(words, 0);
        }
    }
};

}  // namespace sim
