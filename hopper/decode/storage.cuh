// The shared memory of a CTA.

#pragma once

#include "work.cuh"

namespace flash8 {

template <class Config>
struct SharedStorage {
    alignas(1024) char slots[Config::kWarps][Config::kSlots][Config::kSlotBytes];
    uint2 q[Config::kRowTiles][Config::kChannelSteps][32];  // fragments of the second operand
    float merge[Config::kWarps][Config::kBlockM][Config::kMergePitch];
    float reference[Config::kWarps][Config::kBlockM];
    float sum[Config::kWarps][Config::kBlockM];
    // Of all warps together.
    float merged_reference[Config::kBlockM];
    float merged_sum[Config::kBlockM];
    float normalise[Config::kBlockM];
    float weight[Config::kBlockM];       // of the keys, as opposed to the sink
    float score_scale[Config::kBlockM];  // products of a row's fragments times this are its scores
    float slope[Config::kScoreMod ? Config::kBlockM : 1];  // ALiBi
    int own_key[Config::kScoreMod ? Config::kBlockM : 1];  // where in the cache a row's own key is
    float score_shift[Config::kBlockM];  // what K's mean would add to a row's scores, natural log
    uint64_t full[Config::kWarps][Config::kSlots];
    // Of each warp. They are looked at once a segment, and registers are for what is used more.
    Walk<Config> loader_walk[Config::kWarps];
    Walk<Config> walk[Config::kWarps];
    int is_last;
};

constexpr int kSharedBytes = sizeof(SharedStorage<DecodeConfig>);
static_assert(kSharedBytes <= 227 * 1024, "the slots do not fit shared memory");

// A warp changes what it has stored.
template <class Config>
__device__ __forceinline__ void store_walk(Walk<Config>& stored, Walk<Config> const& walk) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        stored = walk;
    }
    __syncwarp();
}

}  // namespace flash8
