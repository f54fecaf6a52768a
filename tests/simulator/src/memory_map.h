// The global memory a kernel may touch: allocations, registered host ranges, module variables.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "written_bytes.h"

namespace sim {

struct MemoryRange {
    uint64_t begin = 0, end = 0;
    std::string what;
    bool owned = false;                       // freed by cuMemFree
    std::shared_ptr<WrittenBytes> written{};  // null: all of it
};

using MemorySnapshot = std::vector<MemoryRange>;  // sorted, never changed

class MemoryMap {
  public:
    static MemoryMap& instance();

    void add(uint64_t begin, uint64_t bytes, const std::string& what, bool owned = false);
    bool remove(uint64_t begin);
    // What is written is known from then on: by the host, by kernels, by copies. Bytes in no range are left
    // out.
    void set_written(uint64_t address, uint64_t bytes, bool written);
    void copy_written(uint64_t to, uint64_t from, uint64_t bytes);
    // The range that holds the address; false when there is none.
    bool find(uint64_t address, MemoryRange* range) const;
    std::shared_ptr<const MemorySnapshot> snapshot() const;
    uint64_t owned_bytes() const;

  private:
    mutable std::mutex mutex_;
    std::map<uint64_t, MemoryRange> ranges_;
    mutable std::shared_ptr<const MemorySnapshot> snapshot_;
};

const MemoryRange* find_range(const MemorySnapshot& snapshot, uint64_t address);
// "0x... is 16 bytes after allocation [0x..., 0x...)", for messages.
std::string describe_address(const MemorySnapshot& snapshot, uint64_t address);

}  // namespace sim
