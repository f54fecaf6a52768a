// Everything that a variant of the decode kernel fixes at compile time. The -D options come from
// flash8.backends.hopper.decode_variants, with enumerators by name.

#pragma once

#include "../arch/mma_sync.cuh"
#include "../arch/ptx.cuh"
#include "../attention/mask.cuh"
#include "../kernel_info.h"
#include "params.h"
#include "tile_sizes.cuh"

#include <cstdint>

namespace flash8 {

enum class ElementChoice { kFp16, kBf16 };  // of q and the output
enum class CacheChoice { kSame, kE4m3 };    // of k and v
enum class LoadChoice { kTma, kGather };
enum class ScaleChoice { kHead, kKey };  // what a descale of K or V belongs to

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The lane. Where registers are short it is asked for anew every time, so that no address made of it takes
// one over a whole loop.
template <class Config>
__device__ __forceinline__ int lane_index() {
    if constexpr (!Config::kRegistersAreShort) {
        return threadIdx.x % 32;
    } else {
        int lane;
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        return lane;
    }
}

constexpr int smaller(int a, int b) {
    return a < b ? a : b;
}

// Stages of descales of keys beside so many slots.
constexpr int scale_stages(int slots) {
    return slots / 2 + 1;
}

constexpr int fitting_slots(int slots, int stage_bytes, int scale_bytes, int room) {
    while (slots * stage_bytes + scale_stages(slots) * scale_bytes > room) {
        --slots;
    }
    return slots;
}

struct DecodeConfig {
    static constexpr auto kElement = ElementChoice::FLASH8_DTYPE;
    static constexpr bool kFp8 = CacheChoice::FLASH8_CACHE == CacheChoice::kE4m3;
    static constexpr bool kGather = LoadChoice::FLASH8_LOAD == LoadChoice::kGather;
    static constexpr bool kScoreMod = FLASH8_SCORE_MOD;  // softcap, ALiBi
    static constexpr bool kKeyScales = ScaleChoice::FLASH8_SCALES == ScaleChoice::kKey;
    static constexpr bool kQv = FLASH8_QV;          // scores are q . k + qv . v
    static constexpr bool kAppend = FLASH8_APPEND;  // new keys go into the cache first (new_keys.cuh)
    static constexpr int kHeadDim = FLASH8_HEAD_DIM;
    static constexpr int kHeadDimV = FLASH8_HEAD_DIM_V;
    static constexpr int kBlockM = FLASH8_ROWS;  // rows of Q: query heads of a KV head, times queries
    static_assert(kBlockM % 8 == 0 && kBlockM <= 32);
    static_assert(!kKeyScales || kFp8);
    static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0);

    // e4m3 is widened to fp16, exactly. P of fp16 is made 2^12 times as large, so that the weights of many
    // faint keys do not vanish.
    static constexpr auto kArithmetic =
        kFp8 || kElement == ElementChoice::kFp16 ? ArithmeticType::kFp16 : ArithmeticType::kBf16;
    static constexpr auto kOutput =
        kElement == ElementChoice::kFp16 ? ArithmeticType::kFp16 : ArithmeticType::kBf16;
    static constexpr float kOffset = kArithmetic == ArithmeticType::kFp16 ? 12.0f : 0.0f;

    static constexpr int kWarps = 8;
    static constexpr int kThreads = kWarps * 32;
    // Where O is too large for the registers of a warp, four have the same tiles, and each has channels of
    // its own (team_mainloop.cuh). Otherwise every warp is a team.
    static constexpr int kTeamWarps = team_warps(kHeadDimV);
    static constexpr int kTeams = kWarps / kTeamWarps;
    static constexpr int kWarpChannelsV = kHeadDimV / kTeamWarps;
    static constexpr int kWarpChannelsK = warp_channels_k(kHeadDim, kHeadDimV, kQv);
    // Beside O of 128 channels in 32 rows: addresses of gathered rows, and what modifies scores.
    static constexpr bool kRegistersAreShort =
        kTeamWarps > 1 || (kBlockM == 32 && kHeadDimV >= 128 && kFp8 && kGather && kScoreMod);
    static constexpr int kWarpsOfK = kQv ? kHeadDim / kWarpChannelsK : kTeamWarps;
    static_assert(!kQv || kTeamWarps > 1);
    static_assert(!kKeyScales || kTeamWarps == 1);
    static_assert(!kAppend || (kTeamWarps == 1 && !kKeyScales));
    static_assert(kWarpsOfK <= kTeamWarps && kWarpChannelsK % 32 == 0 && kWarpChannelsV % 32 == 0);

    // Of what a warp has of a row.
    static constexpr int kElementBytes = kFp8 ? 1 : 2;
    static constexpr int kRowBytesK = kWarpChannelsK * kElementBytes;
    static constexpr int kRowBytesV = kWarpChannelsV * kElementBytes;
    static constexpr int kWidestRow = kRowBytesK > kRowBytesV ? kRowBytesK : kRowBytesV;

    static constexpr int kBlockN = block_n(kWidestRow, kBlockM);
    static constexpr int kKeySteps = kBlockN / 16;  // m16 of a product
    static constexpr int kRowTiles = kBlockM / 8;   // n8 of a product

    static_assert(kTeamWarps == 1 || kRowTiles <= kTeamWarps, "a row tile has the softmax of one warp");
    // Each warp has a ring of slots of its own, which hold a tile of K and a tile of V by turns; with qv a
    // tile of V, and beside it what the warp has of K.
    static constexpr int kSlotBytes = kBlockN * kWidestRow;
    static constexpr int kSlotBytesK = kQv ? kBlockN * kRowBytesK : 0;
    // A CTA gets at least so many tiles: one a warp, and four a team of four.
    static constexpr int kLeastTiles = kWarps;

    static constexpr int kPanelK = kRowBytesK % 128 == 0 ? 128 : kRowBytesK % 64 == 0 ? 64 : 32;
    static constexpr int kPanelV = kRowBytesV % 128 == 0 ? 128 : kRowBytesV % 64 == 0 ? 64 : 32;

    // Q's fragments stay in registers while they are few; otherwise they are read from shared memory.
    // With qv its steps come first.
    static constexpr int kChannelSteps = (kQv ? kHeadDimV + kHeadDim : kHeadDim) / 16;
    static constexpr int kWarpSteps = (kQv ? kWarpChannelsV + kWarpChannelsK : kWarpChannelsK) / 16;
    static constexpr bool kQInRegisters = kRowTiles * kWarpSteps <= (kTeamWarps == 1 ? 16 : 20);

    // Channels of O of each warp that are merged at a time.
    static constexpr int kMergeChannels = kBlockM == 8 && kHeadDimV % 64 == 0 && !kKeyScales ? 64
                                          : kBlockM <= 16                                    ? 32
                                                                                             : 16;
    static constexpr int kMergePitch = kMergeChannels + 4;  // no bank conflicts
    static_assert(kWarpChannelsV % kMergeChannels == 0);

    // What shared memory has room for beside Q, the statistics, and the warps' parts of O, in whose place are
    // the scores and P that a team exchanges.
    static constexpr int kMergeBytes = kWarps * kBlockM * (kMergePitch + 2) * 4;
    static constexpr int kExchangeBytes =
        kTeamWarps == 1 ? 0 : kBlockM * (kWarps * kBlockN * 4 + kTeams * (kBlockN * 2 + 4 + 32));
    static constexpr int kOtherBytes = kBlockM * kChannelSteps * 16 * 2 +
                                       (kMergeBytes > kExchangeBytes ? kMergeBytes : kExchangeBytes) + 4096;
    static constexpr int kRingBytes = smaller(192 * 1024, 227 * 1024 - kOtherBytes);
    static constexpr int kStageBytes = kWarps * kSlotBytes + kTeams * kWarpsOfK * kSlotBytesK;
    // Descales of keys lie beside the slots. The last are in use when those of the tile that takes the first
    // slot to be free again are asked for.
    static constexpr int kScaleBytes = kKeyScales ? kWarps * kBlockN * 8 : 0;
    static constexpr int kSlots = fitting_slots(smaller(8, kRingBytes / kStageBytes), kStageBytes,
                                                kScaleBytes, 227 * 1024 - kOtherBytes);
    static constexpr int kScaleStages = scale_stages(kSlots);
    static_assert(kSlots >= 2);

    using TileMask = Mask<MaskMode::kLocal, kBlockM, kBlockN, true>;
};

}  // namespace flash8
