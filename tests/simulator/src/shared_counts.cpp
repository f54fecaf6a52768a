#include "shared_counts.h"

#include <algorithm>

#include "decoder.h"
#include "machine.h"

namespace sim {
namespace {

constexpr uint32_t kBanks = 32, kWavefrontBytes = 128;

SharedCounts& counts_of(Warp& w, const Op& op) {
    std::vector<SharedCounts>& all = w.cta->shared_counts;
    if (all.empty()) {
        all.resize(w.program->ops.size());
    }
    return all[static_cast<size_t>(&op - w.program->ops.data())];
}

// The most words that one bank has to give, of the words that the accesses at `offsets` touch.
uint32_t wavefronts(const uint32_t* offsets, uint32_t count, uint32_t bytes) {
    uint32_t words[kBanks][kBanks];  // of a bank
    uint32_t used[kBanks] = {};
    uint32_t most = 0;
    for (uint32_t i = 0; i < count; ++i) {
        for (uint32_t word = offsets[i] / 4; word <= (offsets[i] + bytes - 1) / 4; ++word) {
            const uint32_t bank = word % kBanks;
            uint32_t* const end = words[bank] + used[bank];
            if (std::find(words[bank], end, word) == end) {
                *end = word;
                most = std::max(most, ++used[bank]);
            }
        }
    }
    return most;
}

}  // namespace

void count_wavefronts(Warp& w, const Op& op, uint8_t* const* pointers, uint32_t count, uint32_t bytes) {
    const uint64_t begin = reinterpret_cast<uint64_t>(w.cta->shared.data());
    const uint64_t size = w.cta->shared.size();
    const uint32_t group = std::min(kBanks, kWavefrontBytes / bytes);
    SharedCounts fresh;
    for (uint32_t first = 0; first < count; first += group) {
        uint32_t offsets[kBanks];
        uint32_t there = 0;
        bool in_a_row = true;
        for (uint32_t i = first; i < std::min(count, first + group); ++i) {
            const uint64_t offset = reinterpret_cast<uint64_t>(pointers[i]) - begin;
            if (pointers[i] != nullptr && offset < size) {
                in_a_row = in_a_row && (there == 0 || offset == offsets[there - 1] + bytes);
                offsets[there++] = static_cast<uint32_t>(offset);
            }
        }
        if (there != 0) {
            const uint32_t number = in_a_row ? 1 : wavefronts(offsets, there, bytes);
            fresh.wavefronts += number;
            fresh.extra_wavefronts += number - 1;
        }
    }
    if (fresh.wavefronts != 0) {
        fresh.executed = 1;
        counts_of(w, op).add(fresh);
    }
}

void count_operands(Warp& w, const Op& op, const WgmmaShape& shape) {
    SharedCounts fresh;
    fresh.executed = 1;
    const uint64_t k = static_cast<uint64_t>(shape.k);
    fresh.wgmma_a_bytes = shape.a_in_registers ? 0 : 64 * k * bytes_of(shape.a);
    fresh.wgmma_b_bytes = static_cast<uint64_t>(shape.n) * k * bytes_of(shape.b);
    counts_of(w, op).add(fresh);
}

}  // namespace sim
