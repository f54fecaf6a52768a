// The shared memory of a CTA.

#pragma once

#include "config.cuh"
#include "work.cuh"

namespace flash8 {

// What the warps of a team exchange for one tile, and what is kept from tile to tile (team_mainloop.cuh).
template <class Config, bool kIsNeeded = (Config::kTeamWarps > 1)>
struct Exchange {};

template <class Config>
struct Exchange<Config, true> {
    // Accumulators of the scores by the channels of one warp.
    float4 scores[Config::kTeams][Config::kTeamWarps][Config::kRowTiles][Config::kKeySteps][32];
    uint2 weights[Config::kTeams][Config::kRowTiles][Config::kKeySteps][32];  // fragments of P
    float alpha[Config::kTeams][Config::kBlockM];                             // the factors of O
    float2 sum[Config::kTeams][Config::kRowTiles][32];  // of a lane's keys, as Accumulators has it
};

// The descales of K and V of a tile's keys.
template <class Config>
struct TileScales {
    alignas(16) float k[Config::kBlockN];
    float v[Config::kBlockN];

    __device__ __forceinline__ static int place(int key) { return key % 8 * (Config::kBlockN / 8) + key / 8; }
};

template <class Config, bool kIsNeeded = Config::kKeyScales>
struct KeyScaleRing {};

template <class Config>
struct KeyScaleRing<Config, true> {
    TileScales<Config> of[Config::kWarps][Config::kScaleStages];
};

// Rows of Q that the kernel has normalised and rotated.
template <class Config, bool kIsNeeded = Config::kAppend>
struct NewQueries {};

template <class Config>
struct NewQueries<Config, true> {
    alignas(16) uint16_t of[Config::kBlockM][Config::kHeadDim];
};

template <class Config>
struct SharedStorage {
    alignas(1024) char slots[Config::kWarps][Config::kSlots][Config::kSlotBytes];
    char
        slots_k[Config::kQv ? Config::kTeams * Config::kWarpsOfK * Config::kSlots * Config::kSlotBytesK : 16];
    uint2 q[Config::kRowTiles][Config::kChannelSteps][32];  // fragments of the second operand
    union {  // all threads meet between the tiles of a segment and its merge
        float merge[Config::kWarps][Config::kBlockM][Config::kMergePitch];
        Exchange<Config> exchange;
        NewQueries<Config> queries;  // until they are staged
    };
    float reference[Config::kTeams][Config::kBlockM];
    float sum[Config::kTeams][Config::kBlockM];
    // Of all teams together.
    float merged_reference[Config::kBlockM];
    float merged_sum[Config::kBlockM];
    float normalise[Config::kBlockM];
    float weight[Config::kBlockM];       // of the keys, as opposed to the sink
    float score_scale[Config::kBlockM];  // products of a row's fragments times this are its scores
    float slope[Config::kScoreMod ? Config::kBlockM : 1];  // ALiBi
    int own_key[Config::kScoreMod ? Config::kBlockM : 1];  // where in the cache a row's own key is
    float score_shift[Config::kBlockM];  // what K's mean would add to a row's scores, natural log
    float key_factor;                    // q . k times this joins qv . v
    uint64_t full[Config::kWarps][Config::kSlots];
    // Of each warp. They are looked at once a segment, and registers are for what is used more.
    Walk<Config> loader_walk[Config::kWarps];
    Walk<Config> walk[Config::kWarps];
    Share share;  // by scheduler metadata
    int is_last;
    KeyScaleRing<Config> scales;

    // With qv: the part of K that a warp has, if it has one.
    __device__ __forceinline__ char* slot_k(int team, int member, int slot) {
        return slots_k + ((team * Config::kWarpsOfK + member) * Config::kSlots + slot) * Config::kSlotBytesK;
    }
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
