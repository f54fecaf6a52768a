// Which CTA works on which tile of queries.
//
// The CTAs are persistent. The producer warp of each finds the next tile and passes it to the CTA's other
// warps through a TileQueue. Every CTA starts with the tile of its own number. A static schedule goes on with
// every gridDim.x-th tile. A dynamic one claims tiles from a counter in global memory, so that a CTA that is
// done early does more.

#pragma once

#include "../arch/pipeline.cuh"
#include "../arch/ptx.cuh"
#include "../clamp.cuh"
#include "params.h"
#include "sequence_order.cuh"

namespace flash8 {

// kBlockM queries of one head of one sequence; with kPackGqa kBlockM rows of one KV head (pack_gqa.cuh).
struct WorkTile {
    int m_block;
    int head;
    int batch;
    int offset_q;  // first row of a packed sequence in Q and O, else 0

    // No more tiles. Packed rows from offset_q on belong to no sequence.
    __device__ static WorkTile none(int offset_q) { return {0, 0, -1, offset_q}; }
    __device__ bool valid() const { return batch >= 0; }
};

template <bool kPackGqa, class Params>
__device__ __forceinline__ int tile_heads(Params const& params) {
    return kPackGqa ? params.heads_kv : params.heads_q;
}

// The order of m_blocks x heads tiles: sections of heads whose K and V fit L2 together, and in a section the
// last block of queries first. Under a causal mask that one sees the most keys, and long work should not
// start last. Sections of one head put CTAs that share K and V next to each other.
struct TileOrder {
    int m_blocks;
    int heads;
    int heads_per_section;

    __device__ WorkTile at(int index, int batch, int offset_q) const {
        int const section = index / (m_blocks * heads_per_section);
        int const first_head = section * heads_per_section;
        int const section_heads = min(heads_per_section, heads - first_head);
        int const rest = index - m_blocks * first_head;
        int const step = rest / section_heads;
        return {m_blocks - 1 - step, first_head + rest - step * section_heads, batch, offset_q};
    }
};

// How far a walk over packed sequences has come.
struct alignas(16) PackedWalk {
    int place;         // as the order of the sequences has it
    int tiles_before;  // tiles of all that it has come upon before the 32 sequences here
    int rows_before;   // where the first of these starts
    int reserved;      // zero: one load has all of it
};

// Finds the tiles of packed sequences, whose lengths only the device knows. The lanes of a warp hold 32
// sequences at a time and the running sum of their tile counts. All calls are by the whole warp, with indices
// that never decrease.
//
// Offsets that decrease count as the largest before them, and none reaches past the tensor: every row belongs
// to at most one sequence, and there are never more tiles than the host has counted.
template <class Params, int kBlockM, bool kPackGqa, class Order>
class PackedTiles {
  public:
    __device__ explicit PackedTiles(Params const& params)
        : params_(params), order_(params), rows_before_(offset(0)) {}

    // Goes on with a walk.
    __device__ PackedTiles(Params const& params, PackedWalk const& walk)
        : params_(params),
          order_(params, walk.place),
          tiles_before_(walk.tiles_before),
          rows_before_(walk.rows_before) {}

    __device__ PackedWalk walk() const { return {order_.place(), tiles_before_, rows_before_, 0}; }

    __device__ WorkTile at(int index) {
        while (true) {
            int const lane = ptx::lane_index();
            int const batch = order_.first_batch() + lane;
            bool const exists = batch < params_.sequences.batch;
            bool const has = exists && order_.has(batch);
            int const row_end = inclusive_max(exists ? offset(batch + 1) : 0);
            int const above = __shfl_up_sync(0xffffffff, row_end, 1);
            int const row_begin = lane == 0 ? rows_before_ : above;
            int const m_blocks = has ? m_blocks_of(row_end - row_begin) : 0;
            int const end = tiles_before_ + inclusive_sum(m_blocks * tile_heads<kPackGqa>(params_), lane);
            unsigned const ends_after = __ballot_sync(0xffffffff, end > index);
            if (ends_after != 0) {
                int const first = __ffs(ends_after) - 1;
                return found(index, order_.first_batch() + first, __shfl_sync(0xffffffff, m_blocks, first),
                             __shfl_sync(0xffffffff, end, first), __shfl_sync(0xffffffff, row_begin, first));
            }
            rows_before_ = __shfl_sync(0xffffffff, row_end, 31);
            tiles_before_ = __shfl_sync(0xffffffff, end, 31);
            if (!order_.advance()) {
                return WorkTile::none(rows_before_);
            }
            if (order_.first_batch() == 0) {
                rows_before_ = offset(0);  // through the batch once more
            }
        }
    }

  private:
    __device__ int offset(int index) const {
        return clamped(params_.sequences.cu_seqlens_q[index], 0, static_cast<int>(params_.sequences.total_q));
    }

    __device__ int m_blocks_of(int queries) const {
        // Unsigned, because rows + block may not fit a signed integer.
        unsigned const block = kPackGqa ? kBlockM / (params_.heads_q / params_.heads_kv) : kBlockM;
        return static_cast<int>((static_cast<unsigned>(queries) + block - 1) / block);
    }

    __device__ static int inclusive_sum(int value, int lane) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            int const below = __shfl_up_sync(0xffffffff, value, distance);
            value += lane >= distance ? below : 0;
        }
        return value;
    }

    // Also over everything before the group.
    __device__ int inclusive_max(int value) const {
        value = max(value, rows_before_);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            value = max(value, __shfl_up_sync(0xffffffff, value, distance));
        }
        return value;
    }

    __device__ WorkTile found(int index, int batch, int m_blocks, int end, int row_begin) const {
        int const heads = tile_heads<kPackGqa>(params_);
        TileOrder const order{m_blocks, heads, min(params_.scheduler.heads_per_section, heads)};
        return order.at(index - (end - m_blocks * heads), batch, row_begin);
    }

    Params const& params_;
    Order order_;
    int tiles_before_ = 0;
    int rows_before_;
};

// What a CTA does next; all calls but `claim` by the whole producer warp. The host keeps the sum of tiles and
// CTAs below 2^31. The CTAs of a cluster take neighbouring blocks of rows: to this class they are one CTA
// with kClusterM times the rows, and their schedule is static.
//
// The counter is zero when a kernel starts and zero again when it has ended, whatever the tensors hold. The
// last CTA to run out of tiles resets it: no CTA claims after that.
template <class Params, int kBlockM, bool kPackGqa, int kClusterM, class Order>
class TileScheduler {
  public:
    // walk: in shared memory, since the producer warp has few registers; of packed sequences alone.
    __device__ TileScheduler(Params const& params, PackedWalk& walk)
        : params_(params), walk_(walk), index_(blockIdx.x / kClusterM) {}

    __device__ WorkTile first() {
        return leave_after_last(packed() ? packed_tile(Tiles(params_)) : dense_tile());
    }

    // By the first lane, once a tile: claims the next one. `next` waits for the number. Nothing may be
    // computed from it here, or the lane would wait here.
    __device__ void claim() {
        if (counter() != nullptr) {
            index_ = atomicAdd(counter(), 1);
        }
    }

    __device__ WorkTile next() {
        index_ = __shfl_sync(0xffffffff, index_, 0) + static_cast<int>(gridDim.x / kClusterM);
        return leave_after_last(packed() ? packed_tile(Tiles(params_, walk_)) : dense_tile());
    }

  private:
    using Tiles = PackedTiles<Params, kBlockM * kClusterM, kPackGqa, Order>;

    __device__ int* counter() const { return kClusterM == 1 ? params_.scheduler.tile_count : nullptr; }
    __device__ bool packed() const { return params_.sequences.cu_seqlens_q != nullptr; }

    // A CTA runs out of tiles once, and claims no more. The counter of the CTAs that have left wraps to zero
    // by itself.
    __device__ WorkTile leave_after_last(WorkTile tile) const {
        if constexpr (kClusterM > 1) {
            tile.m_block = tile.m_block * kClusterM + ptx::cluster_rank();
        } else if (!tile.valid() && counter() != nullptr && threadIdx.x % 32 == 0) {
            unsigned const last = gridDim.x - 1;
            __threadfence();  // this CTA's claims come before its departure
            if (atomicInc(reinterpret_cast<unsigned*>(counter() + 1), last) == last) {
                __threadfence();
                atomicExch(counter(), 0);
            }
        }
        return tile;
    }

    // The heads of all sequences, when all have the same length.
    __device__ int dense_heads() const { return tile_heads<kPackGqa>(params_) * params_.sequences.batch; }

    // Lane 0 keeps the walk for all lanes.
    __device__ WorkTile packed_tile(Tiles tiles) {
        WorkTile const tile = tiles.at(index_);
        __syncwarp();  // all have read the walk
        if (ptx::lane_index() == 0) {
            walk_ = tiles.walk();
        }
        __syncwarp();
        return tile;
    }

    __device__ WorkTile dense_tile() const {
        if (index_ >= params_.scheduler.max_m_blocks * dense_heads()) {
            return WorkTile::none(0);
        }
        TileOrder const order{params_.scheduler.max_m_blocks, dense_heads(),
                              params_.scheduler.heads_per_section};
        WorkTile tile = order.at(index_, 0, 0);
        tile.batch = tile.head / tile_heads<kPackGqa>(params_);
        tile.head -= tile.batch * tile_heads<kPackGqa>(params_);
        return tile;
    }

    Params const& params_;
    PackedWalk& walk_;
    int index_;
};

// One tile on its way from the producer warp to the CTA's other warps. They release the place as soon as they
// have read it, so the producer can publish the next tile, and load for it, while they work.
struct TileQueue {
    int4 tile;  // as WorkTile has it
    Pipeline<1> pipeline;

    __device__ void init(int reader_warps) { pipeline.init(reader_warps); }

    // By one thread.
    __device__ void publish(PipelineState<1>& state, WorkTile const& next) {
        ptx::mbarrier_wait(&pipeline.empty[0], state.parity ^ 1);
        tile = make_int4(next.m_block, next.head, next.batch, next.offset_q);
        ptx::mbarrier_arrive(&pipeline.full[0]);
        state.advance();
    }

    // By all lanes of a warp.
    __device__ WorkTile take(PipelineState<1>& state) {
        pipeline.wait(state);
        int4 const taken = tile;
        __syncwarp();
        pipeline.release(state);
        state.advance();
        return {taken.x, taken.y, taken.z, taken.w};
    }
};

}  // namespace flash8
