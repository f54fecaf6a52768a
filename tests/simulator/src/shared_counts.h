// How shared memory is used: wavefronts of loads and stores by the rule of the banks, operands of wgmma.
//
// 32 banks of 4 bytes serve one word each in a wavefront; lanes that want the same word share it. Accesses of
// 8 bytes go by half warps, of 16 bytes by quarter warps; ldmatrix and stmatrix by matrix, 8 rows of 16
// bytes.
#pragma once

#include <cstdint>

namespace sim {

struct Warp;
struct Op;
struct WgmmaShape;

struct SharedCounts {
    uint64_t executed = 0;  // instructions of a warp, or of a warpgroup
    uint64_t wavefronts = 0;
    uint64_t extra_wavefronts = 0;                  // above one for each group of lanes: conflicts of banks
    uint64_t wgmma_a_bytes = 0, wgmma_b_bytes = 0;  // each operand in shared memory once a wgmma

    void add(const SharedCounts& other) {
        executed += other.executed;
        wavefronts += other.wavefronts;
        extra_wavefronts += other.extra_wavefronts;
        wgmma_a_bytes += other.wgmma_a_bytes;
        wgmma_b_bytes += other.wgmma_b_bytes;
    }
};

// An access of `bytes` at each of the pointers that lie in the CTA's own shared memory (null: no access).
void count_wavefronts(Warp& warp, const Op& op, uint8_t* const* pointers, uint32_t count, uint32_t bytes);
void count_operands(Warp& warp, const Op& op, const WgmmaShape& shape);

}  // namespace sim
