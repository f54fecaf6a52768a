// Every named barrier of flash8's kernels. Barrier 0 belongs to __syncthreads.

#pragma once

#include "ptx.cuh"

namespace flash8 {

enum class NamedBarrier : int {
    // Consumer warpgroup i may issue its products: WarpgroupTurn + i.
    kWarpgroupTurn = 1,  // and 2, 3
    // All consumer warpgroups, or all warps that transpose V, have cleared their share of V's hidden rows.
    kHiddenKeysCleared = 4,
    // The threads of consumer warpgroup i vote: WarpgroupVote + i.
    kWarpgroupVote = 5,  // and 6, 7
    // Backward: all consumer warpgroups have subtracted their share of K's mean, or have made their share of
    // K and V in 16 bits.
    kKeysPrepared = 8,
    // Decode: the warps of team i have written what they exchange: TeamMeeting + i.
    kTeamMeeting = 9,  // and 10
    // QKV projection: all consumer warps have written the largest magnitude of their part of a tile.
    kTileAmax = 11,
};

// The warps of one team wait for each other.
template <int kTeams, int kTeamWarps>
struct TeamMeeting {
    static constexpr int kThreads = kTeamWarps * 32;
    static_assert(kTeams <= 2, "two barriers have a name");

    __device__ __forceinline__ static void wait(int team) {
        ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTeamMeeting) + team, kThreads);
    }
};

// Ping-pong scheduling: the warpgroups take turns to issue their products, so that the softmax of one
// overlaps the products of another. FlashAttention-3 calls this the warp scheduler barrier. Barrier
// kWarpgroupTurn + i completes when warpgroup i syncs (128 threads) and its predecessor has arrived (128
// threads).
template <int kWarpgroups>
struct WarpgroupTurns {
    static constexpr int kThreads = 2 * 128;

    // Before the first turn: the last warpgroup gives the first its turn.
    __device__ static void start(int warpgroup) {
        if (warpgroup == kWarpgroups - 1) {
            ptx::named_barrier_arrive(id(0), kThreads);
        }
    }

    __device__ __forceinline__ static void wait(int warpgroup) {
        ptx::named_barrier_sync(id(warpgroup), kThreads);
    }

    __device__ __forceinline__ static void pass_on(int warpgroup) {
        ptx::named_barrier_arrive(id(warpgroup == kWarpgroups - 1 ? 0 : warpgroup + 1), kThreads);
    }

    // After the last turn: the first warpgroup takes the arrival that is left over.
    __device__ static void finish(int warpgroup) {
        if (warpgroup == 0) {
            ptx::named_barrier_sync(id(0), kThreads);
        }
    }

  private:
    __device__ __forceinline__ static int id(int warpgroup) {
        return static_cast<int>(NamedBarrier::kWarpgroupTurn) + warpgroup;
    }
};

}  // namespace flash8
