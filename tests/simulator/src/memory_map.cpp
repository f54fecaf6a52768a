#include "memory_map.h"

#include <algorithm>

#include "errors.h"

namespace sim {

MemoryMap& MemoryMap::instance() {
    static MemoryMap map;
    return map;
}

void MemoryMap::add(uint64_t begin, uint64_t bytes, const std::string& what, bool owned) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ranges_[begin] = {begin, begin + bytes, what, owned};
    snapshot_.reset();
}

bool MemoryMap::remove(uint64_t begin) {
    const std::lock_guard<std::mutex> lock(mutex_);
    snapshot_.reset();
    return ranges_.erase(begin) != 0;
}

void MemoryMap::set_written(uint64_t address, uint64_t bytes, bool written) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = ranges_.upper_bound(address);
    if (after == ranges_.begin()) {
        return;
    }
    MemoryRange& range = std::prev(after)->second;
    if (address >= range.end) {
        return;
    }
    if (!range.written && !written) {
        range.written = std::make_shared<WrittenBytes>(range.begin, range.end - range.begin);
        range.written->set(range.begin, range.end - range.begin, true);
        snapshot_.reset();
    }
    if (range.written) {
        range.written->set(address, std::min(bytes, range.end - address), written);
    }
}

void MemoryMap::copy_written(uint64_t to, uint64_t from, uint64_t bytes) {
    MemoryRange range;
    if (!find(from, &range) || !range.written) {
        set_written(to, bytes, true);
        return;
    }
    const uint64_t end = from + std::min(bytes, range.end - from);
    for (uint64_t at = from; at < end;) {
        const uint64_t stop = range.written->first_unwritten(at, end - at);
        set_written(to + (at - from), stop - at, true);
        uint64_t next = stop;
        while (next < end && range.written->first_unwritten(next, 1) == next) {
            ++next;
        }
        if (next != stop) {
            set_written(to + (stop - from), next - stop, false);
        }
        at = next;
    }
}

bool MemoryMap::find(uint64_t address, MemoryRange* range) const {
    const auto current = snapshot();
    const MemoryRange* found = find_range(*current, address);
    if (found != nullptr) {
        *range = *found;
    }
    return found != nullptr;
}

std::shared_ptr<const MemorySnapshot> MemoryMap::snapshot() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!snapshot_) {
        auto fresh = std::make_shared<MemorySnapshot>();
        for (const auto& entry : ranges_) {
            fresh->push_back(entry.second);
        }
        snapshot_ = fresh;
    }
    return snapshot_;
}

uint64_t MemoryMap::owned_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t bytes = 0;
    for (const auto& entry : ranges_) {
        bytes += entry.second.owned ? entry.second.end - entry.second.begin : 0;
    }
    return bytes;
}

const MemoryRange* find_range(const MemorySnapshot& snapshot, uint64_t address) {
    auto after = std::upper_bound(snapshot.begin(), snapshot.end(), address,
                                  [](uint64_t a, const MemoryRange& r) { return a < r.begin; });
    // Registered ranges may nest (a view of a tensor): look back while one could still reach.
    for (int i = 0; i < 8 && after != snapshot.begin(); ++i) {
        --after;
        if (address < after->end) {
            return &*after;
        }
    }
    return nullptr;
}

std::string describe_address(const MemorySnapshot& snapshot, uint64_t address) {
    const MemoryRange* below = nullptr;
    const MemoryRange* above = nullptr;
    for (const MemoryRange& range : snapshot) {
        if (range.begin <= address) {
            below = &range;
        } else if (above == nullptr) {
            above = &range;
        }
    }
    std::string text = format("address 0x%llx", static_cast<unsigned long long>(address));
    if (below != nullptr && address >= below->end && address - below->end < (1u << 24)) {
        return text + format(" is %llu bytes past the end of %s [0x%llx, 0x%llx)",
                             static_cast<unsigned long long>(address - below->end), below->what.c_str(),
                             static_cast<unsigned long long>(below->begin),
                             static_cast<unsigned long long>(below->end));
    }
    if (above != nullptr && above->begin - address < (1u << 24)) {
        return text + format(" is %llu bytes before %s [0x%llx, 0x%llx)",
                             static_cast<unsigned long long>(above->begin - address), above->what.c_str(),
                             static_cast<unsigned long long>(above->begin),
                             static_cast<unsigned long long>(above->end));
    }
    return text + " is in no known allocation";
}

}  // namespace sim
