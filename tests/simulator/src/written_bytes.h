// Which bytes of an allocation somebody has written: a bit each.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace sim {

class WrittenBytes {
  public:
    WrittenBytes(uint64_t begin, uint64_t bytes) : begin_(begin), words_((bytes + 63) / 64) {}

    void set(uint64_t address, uint64_t bytes, bool written);
    // The first byte of the range that nobody wrote; its end when there is none.
    uint64_t first_unwritten(uint64_t address, uint64_t bytes) const;

  private:
    uint64_t begin_;
    std::vector<std::atomic<uint64_t>> words_;  // host threads may share one
};

}  // namespace sim
