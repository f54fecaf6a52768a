// What the checker remembers of each 4-byte word of shared memory.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace sim {

// Who touched a word, when by that agent's own clock, which lane, with which scope (Level) and at which
// PTX line: 12 + 24 + 5 + 2 + 21 bits.
using Epoch = uint64_t;
inline Epoch make_epoch(uint32_t agent, uint32_t time, uint32_t lane, uint32_t level, int line) {
    return (uint64_t{agent} << 52) | (uint64_t{time & 0xffffffu} << 28) | (uint64_t{lane} << 23) |
           (uint64_t{level} << 21) | (static_cast<uint32_t>(line) & 0x1fffffu);
}
inline uint32_t agent_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 52);
}
inline uint32_t time_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 28) & 0xffffffu;
}
inline uint32_t lane_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 23) & 31u;
}
inline uint32_t level_of(Epoch epoch) {
    return static_cast<uint32_t>(epoch >> 21) & 3u;
}
inline int line_of(Epoch epoch) {
    return static_cast<int>(epoch & 0x1fffffu);
}

constexpr uint8_t kMbarrierWord = 0x10;  // in SharedShadow::written: part of a live mbarrier

// Zeros that cost nothing until they are touched: many CTAs are resident, and most use little of theirs.
struct FreeEpochs {
    void operator()(Epoch* epochs) const { std::free(epochs); }
};
using Epochs = std::unique_ptr<Epoch[], FreeEpochs>;
inline Epochs zero_epochs(size_t count) {
    return Epochs(static_cast<Epoch*>(std::calloc(count, sizeof(Epoch))));
}

struct SharedShadow {
    static constexpr size_t kReaders = 4;
    std::vector<uint8_t> written;  // a bit per byte, and kMbarrierWord
    Epochs writer;
    std::array<Epochs, kReaders> readers;

    void allocate(uint32_t bytes, bool with_epochs) {
        const size_t words = (bytes + 3) / 4;
        written.assign(words, 0);
        if (!with_epochs) {
            return;
        }
        writer = zero_epochs(words + 1);
        for (Epochs& slot : readers) {
            slot = zero_epochs(words + 1);
        }
    }
};

}  // namespace sim
