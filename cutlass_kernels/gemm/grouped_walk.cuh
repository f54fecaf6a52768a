// The walk over tiles where rows of A belong to groups, each with a B of its own, or where K belongs to
// groups, each with an out of its own. How many rows, or how much of K, a group has only the device knows.

#pragma once

#include "clamp.cuh"
#include "tile.cuh"

namespace flash8::gemm {

// Running maximum and sum over the lanes of a warp, from lane 0 on.
__device__ __forceinline__ int running_max(int value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        value = max(value, __shfl_up_sync(0xffffffff, value, distance));
    }
    return value;
}

__device__ __forceinline__ int running_sum(int value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        int const below = __shfl_up_sync(0xffffffff, value, distance);
        value += threadIdx.x % 32 >= distance ? below : 0;
    }
    return value;
}

// Where the rows, or the K, of a group end by its offset. Offsets may hold anything: none reaches past the
// rows, and one that decreases counts as the largest before it. So every row below the largest offset has one
// group.
__device__ __forceinline__ int clamped_offset(GemmParams const& params, int group) {
    int const most = Config::kGroupedK ? params.k : params.m;
    return group < params.groups ? clamped(params.group_rows[group], 0, most) : 0;
}

// Static and persistent, as the walk over one matrix. Group after group, each with the blocks of rows that it
// fills: a tile has rows of one group only. Along K a group has all tiles of its out, or none where its K is
// empty. All calls are by a whole warp. Its lanes hold 32 groups at a time, read once, so that up to 32
// groups cost a ballot and a few shuffles a tile. There are never more tiles than the host has counted.
class GroupedTileWalk {
  public:
    __device__ explicit GroupedTileWalk(GemmParams const& params)
        : params_(params), index_(static_cast<int>(blockIdx.x)) {
        hold_groups(0, 0, 0);
    }

    __device__ __forceinline__ bool next(Tile& tile) {
        unsigned ends_after = __ballot_sync(0xffffffff, tiles_end_ > index_);
        while (ends_after == 0) {
            if (first_group_ + 32 >= params_.groups) {
                return false;
            }
            hold_groups(first_group_ + 32, __shfl_sync(0xffffffff, end_, 31),
                        __shfl_sync(0xffffffff, tiles_end_, 31));
            ends_after = __ballot_sync(0xffffffff, tiles_end_ > index_);
        }
        int const lane = __ffs(ends_after) - 1;
        int const begin = __shfl_sync(0xffffffff, begin_, lane);
        int const end = __shfl_sync(0xffffffff, end_, lane);
        int const m_blocks = m_blocks_of(end - begin);
        int const first = __shfl_sync(0xffffffff, tiles_end_, lane) - m_blocks * params_.n_blocks;
        tile = tile_in_bands(params_, index_ - first, m_blocks);
        if constexpr (Config::kGroupedK) {
            tile.m_end = params_.m;
            tile.k_begin = begin;
            tile.k_end = end;
        } else {
            tile.m0 += begin;
            tile.m_end = end;
        }
        tile.group = first_group_ + lane;
        index_ += static_cast<int>(gridDim.x);
        return true;
    }

  private:
    // Those from `first` on, a lane each. Lanes beyond the last group have no rows, or no K.
    __device__ __forceinline__ void hold_groups(int first, int before, int tiles_before) {
        int const lane = static_cast<int>(threadIdx.x % 32);
        int const group = first + lane;
        first_group_ = first;
        if (!Config::kGroupedK && params_.rows_per_group > 0) {
            int const rows = group < params_.groups ? params_.group_rows[group] : 0;
            begin_ = group < params_.groups ? group * params_.rows_per_group : 0;
            end_ = begin_ + clamped(rows, 0, params_.rows_per_group);
        } else {
            end_ = running_max(max(before, clamped_offset(params_, group)));
            int const end_below = __shfl_up_sync(0xffffffff, end_, 1);
            begin_ = lane == 0 ? before : end_below;
        }
        tiles_end_ = tiles_before + running_sum(m_blocks_of(end_ - begin_) * params_.n_blocks);
    }

    // Of a group with so many rows, or so much of K.
    __device__ __forceinline__ int m_blocks_of(int size) const {
        if constexpr (Config::kGroupedK) {
            return size > 0 ? params_.m_blocks : 0;
        } else {
            return (size + Config::kBlockM - 1) / Config::kBlockM;
        }
    }

    GemmParams const& params_;
    int index_;  // the next tile; the host keeps the most tiles + gridDim.x below 2^31
    int first_group_;
    int begin_;  // of the rows of this lane's group, or of its K
    int end_;
    int tiles_end_;  // tiles of all groups up to this lane's
};

// By all lanes of a warp.
__device__ __forceinline__ void clear_row(GemmParams const& params, int64_t row) {
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const bytes = params.out_type == ElementType::kFloat32 ? 4 : 2;
    char* const at = static_cast<char*>(params.out) + row * params.out_stride * bytes;
    if (params.vector_stores) {
        for (int64_t i = 16 * lane; i < int64_t{params.n} * bytes; i += 16 * 32) {
            *reinterpret_cast<uint4*>(at + i) = make_uint4(0, 0, 0, 0);
        }
    } else {
        for (int64_t i = 2 * lane; i < int64_t{params.n} * bytes; i += 2 * 32) {
            *reinterpret_cast<uint16_t*>(at + i) = 0;
        }
    }
}

// By all lanes of a warp that has nothing else to do: rows of out that no offset reaches are zeros. Groups
// that are apart have no such rows, but unused ones of their own, which are left alone.
__device__ void clear_rows_of_no_group(GemmParams const& params) {
    if (params.rows_per_group > 0) {
        return;
    }
    int const lane = static_cast<int>(threadIdx.x % 32);
    int end = 0;
    for (int group = lane; group < params.groups; group += 32) {
        end = max(end, clamped_offset(params, group));
    }
    end = __shfl_sync(0xffffffff, running_max(end), 31);
    for (int row = end + static_cast<int>(blockIdx.x); row < params.m; row += static_cast<int>(gridDim.x)) {
        clear_row(params, row);
    }
}

// The same along K: a group without any has no tiles, and zeros.
__device__ void clear_groups_without_k(GemmParams const& params) {
    int begin = 0;
    for (int group = 0; group < params.groups; ++group) {
        int const end = max(begin, clamped_offset(params, group));
        if (end == begin) {
            for (int row = static_cast<int>(blockIdx.x); row < params.m; row += static_cast<int>(gridDim.x)) {
                clear_row(params, int64_t{group} * params.m + row);
            }
        }
        begin = end;
    }
}

}  // namespace flash8::gemm
