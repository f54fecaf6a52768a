// Fills the slots of one warp's ring: K of a tile, then V of it, then K of the next tile; with qv both of a
// tile at once. Of a team each warp loads its channels.
//
//   loader (the same warp)              products
//   fill a slot                         wait until it is full
//                                       ... ldmatrix reads it ...
//   fill it again, kSlots further  <--  all lanes have read it
//
// A warp fills only what it has read itself, so there are no empty barriers: __syncwarp orders the reads of
// all lanes before the next fill.
//
// By TMA, the slot's barrier counts the bytes. A box is a part of a page that no tile cuts, and its page
// number is a coordinate; boxes that no query sees get a page that does not exist, and read as zeros. By
// gather, each lane copies 16 bytes at a time, and counts its own groups of copies. Keys that no query sees
// are not read.

#pragma once

#include "../arch/swizzled_tile.cuh"
#include "../attention/pages.cuh"
#include "key_scales.cuh"
#include "storage.cuh"

namespace flash8 {

template <class Config>
class KeyFinder {
  public:
    __device__ explicit KeyFinder(DecodeParams const& params) : params_(params) {}

    // The page of cache row `batch_k` that holds keys from `position` on, of which some query sees [begin,
    // end).
    __device__ KeyPlace find(int batch_k, int position, int keys, int begin, int end) const {
        bool const seen = position < end && position + keys > begin;
        if (params_.pages.page_table == nullptr) {
            return {seen ? batch_k : params_.pages.num_pages, position};
        }
        KeyPlace const place = look_up_page(params_.pages, batch_k, position, seen);
        bool const exists = place.page >= 0 && place.page < params_.pages.num_pages;
        return {exists ? place.page : params_.pages.num_pages, place.row};
    }

  private:
    DecodeParams const& params_;
};

template <class Config>
class Loader {
    static constexpr int kBlockN = Config::kBlockN;
    // By gather: keys of a lane in the table of places.
    static constexpr int kPlaces = Config::kGather ? (kBlockN + 31) / 32 : 1;

  public:
    __device__ Loader(DecodeParams const& params, SharedStorage<Config>& shared, Share const& share, int warp)
        : params_(params),
          shared_(shared),
          finder_(params),
          warp_(warp),
          team_(warp / Config::kTeamWarps),
          member_(warp % Config::kTeamWarps) {
        store_walk(shared.loader_walk[warp], Walk<Config>::over(share));
    }

    // Fills the whole ring.
    __device__ void start() {
#pragma unroll 1
        for (int slot = 0; slot < Config::kSlots; ++slot) {
            if (!Config::kQv && slot % 2 == 0) {
                fill<false>(slot);
            } else {
                fill<true>(slot);
            }
        }
    }

    // With K of the next tile, or with V of the same; with qv by kV, with both of the next tile. By all
    // lanes, which have read the slot.
    template <bool kV>
    __device__ __forceinline__ void fill(int slot) {
        __syncwarp();
        if constexpr (!kV || Config::kQv) {
            advance();
        }
        if constexpr (Config::kKeyScales && !kV) {
            if (more_) {
                copy_scales();
            }
            if constexpr (!Config::kGather) {
                ptx::copy_async_commit();
            }
        }
        bool const beside = Config::kQv && member_ < Config::kWarpsOfK;
        if constexpr (Config::kGather) {
            if (more_) {
                if (beside) {
                    gather<false>(slot);
                }
                gather<kV>(slot);
            }
            ptx::copy_async_commit();  // an empty group, too, keeps the count
        } else if (more_) {
            constexpr int kBytes = kBlockN * (kV ? Config::kRowBytesV : Config::kRowBytesK);
            if (threadIdx.x % 32 == 0) {
                ptx::mbarrier_expect_tx(&shared_.full[warp_][slot],
                                        kBytes + (beside ? Config::kSlotBytesK : 0));
            }
            if (beside) {
                load<false>(slot);
            }
            load<kV>(slot);
        }
    }

  private:
    __device__ __forceinline__ void advance() {
        if (!more_) {
            return;
        }
        tile_ += 1;
        if (tile_ >= end_) {
            enter_segment();
        } else {
#pragma unroll
            for (int i = 0; i < kPlaces; ++i) {
                places_[i] = next_places_[i];
            }
        }
        if (tile_ + 1 < end_) {
            find(tile_ + 1, next_places_);
        }
    }

    __device__ void enter_segment() {
        Walk<Config> walk = shared_.loader_walk[warp_];
#pragma unroll 1
        do {
            more_ = walk.next(params_);
            if (!more_) {
                return;
            }
            KeyRange const tiles = walk.segment.template of_team<Config>(team_);
            tile_ = tiles.begin;
            end_ = tiles.end;
        } while (tile_ >= end_);
        store_walk(shared_.loader_walk[warp_], walk);
        // From here on tiles are counted from the start of the cache.
        tile_ += walk.sequence.first_tile();
        end_ += walk.sequence.first_tile();
        find(tile_, places_);
    }

    // The places of this lane's keys, or of its box.
    __device__ __forceinline__ void find(int tile, KeyPlace (&places)[kPlaces]) const {
        SequenceWork<Config> const& sequence = shared_.loader_walk[warp_].sequence;
        int const lane = lane_index<Config>();
        int const step = Config::kGather ? 1 : params_.pages.box_rows;
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
            int const key = (lane + 32 * i) * step;
            if (key < kBlockN) {
                places[i] = finder_.find(sequence.info.batch_k, tile * kBlockN + key, step, sequence.begin,
                                         sequence.end);
            }
        }
    }

    // Those of the tile that `fill` asks for, in the group of its copies.
    __device__ __forceinline__ void copy_scales() {
        Walk<Config> const& walk = shared_.loader_walk[warp_];
        TileScales<Config>& scales = shared_.scales.of[warp_][scale_stage_];
        scale_stage_ = scale_stage_ + 1 == Config::kScaleStages ? 0 : scale_stage_ + 1;
        int const first = tile_ * kBlockN;
        int const box_shift = Config::kGather ? 0 : 31 - __clz(params_.pages.box_rows);
#pragma unroll
        for (int i = 0; i < kBlockN / 32; ++i) {
            int const key = threadIdx.x % 32 + 32 * i;
            KeyPlace place = places_[Config::kGather ? i : 0];
            if constexpr (!Config::kGather) {
                int const box = key >> box_shift;
                place.page = __shfl_sync(0xffffffff, places_[0].page, box);
                place.row = __shfl_sync(0xffffffff, places_[0].row, box) + key - (box << box_shift);
            }
            bool const seen = first + key >= walk.sequence.begin && first + key < walk.sequence.end &&
                              place.page < params_.pages.num_pages;
            KeyScaleLoader<Config>(params_).copy(scales, key, place, walk.segment.head, seen);
        }
    }

    template <bool kV>
    __device__ __forceinline__ char* target_of(int slot) const {
        return Config::kQv && !kV ? shared_.slot_k(team_, member_, slot) : shared_.slots[warp_][slot];
    }

    template <bool kV>
    __device__ __forceinline__ void load(int slot) {
        constexpr int kRowBytes = kV ? Config::kRowBytesV : Config::kRowBytesK;
        constexpr int kPanel = kV ? Config::kPanelV : Config::kPanelK;
        uint64_t* const barrier = &shared_.full[warp_][slot];
        char* const target = target_of<kV>(slot);
        void const* const map = kV ? &params_.tma_v : &params_.tma_k;
        int const first_channel = member_ * (kV ? Config::kWarpChannelsV : Config::kWarpChannelsK);
        int const head = shared_.loader_walk[warp_].segment.head;
        int const lane = lane_index<Config>();
        int const box_rows = params_.pages.box_rows;
#pragma unroll 1
        for (int box = 0, first = 0; first < kBlockN; ++box, first += box_rows) {
            int const page = __shfl_sync(0xffffffff, places_[0].page, box);
            int const row = __shfl_sync(0xffffffff, places_[0].row, box);
            if (lane == 0) {
#pragma unroll
                for (int panel = 0; panel < kRowBytes / kPanel; ++panel) {
                    ptx::tma_load_4d(target + (panel * kBlockN + first) * kPanel, map, barrier,
                                     first_channel + panel * kPanel / Config::kElementBytes, row, head, page);
                }
            }
        }
    }

    template <bool kV>
    __device__ __forceinline__ void gather(int slot) {
        constexpr int kRowBytes = kV ? Config::kRowBytesV : Config::kRowBytesK;
        constexpr int kPanel = kV ? Config::kPanelV : Config::kPanelK;
        constexpr int kLanesPerRow = kPanel / 16;
        constexpr int kRows = 32 / kLanesPerRow;  // at a time
        constexpr int kUnit = 16 / Config::kElementBytes;
        int const head = shared_.loader_walk[warp_].segment.head;
        TensorRef const& ref = kV ? params_.v : params_.k;
        int const channels = kV ? params_.head_dim_v : params_.head_dim;
        int const lane = lane_index<Config>();
        // In units of 16 bytes: the host refuses caches in which 32 bits do not count them.
        uint32_t units[kPlaces];
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
            units[i] = kNowhere;
            if (places_[i].page < params_.pages.num_pages) {
                units[i] = static_cast<uint32_t>((places_[i].page * ref.batch_stride +
                                                  places_[i].row * ref.row_stride + head * ref.head_stride) /
                                                 kUnit);
            }
        }
        int const first_byte = member_ * kRowBytes;
        char const* const source = static_cast<char const*>(ref.ptr) + first_byte + lane % kLanesPerRow * 16;
        uint32_t const target = ptx::shared_address(target_of<kV>(slot));
        // A large O leaves few registers for addresses, and softcap or ALiBi beside 32 rows hardly any.
        constexpr bool kLarge = Config::kBlockM * Config::kWarpChannelsV >= 3072;
        constexpr bool kFull = (Config::kScoreMod || Config::kTeamWarps > 1) && Config::kBlockM == 32;
        constexpr int kUnrolled = kFull ? 1 : kLarge ? 2 : kBlockN / kRows;
#pragma unroll kUnrolled
        for (int first = 0; first < kBlockN; first += kRows) {
            int const row = first + lane / kLanesPerRow;
            uint32_t const unit = __shfl_sync(0xffffffff, units[first / 32], row % 32);
#pragma unroll
            for (int panel = 0; panel < kRowBytes / kPanel; ++panel) {
                int const byte = panel * kPanel + lane % kLanesPerRow * 16;
                bool const reads = unit != kNowhere && first_byte + byte < channels * Config::kElementBytes;
                ptx::copy_async_16(target + SwizzledTile<kBlockN, kPanel>::offset(row, byte),
                                   source + (reads ? unit * int64_t{16} + panel * kPanel : 0), reads);
            }
        }
    }

    static constexpr uint32_t kNowhere = 0xffffffff;

    DecodeParams const& params_;
    SharedStorage<Config>& shared_;
    KeyFinder<Config> finder_;
    int warp_;
    int team_;
    int member_;
    int tile_ = 0;  // the last one of K that was asked for, of this team's [.., end_) of the segment
    int end_ = 0;
    bool more_ = true;
    int scale_stage_ = 0;              // where descales of keys go next
    KeyPlace places_[kPlaces]{};       // of the tile
    KeyPlace next_places_[kPlaces]{};  // of the one after it: read one tile ahead
};

}  // namespace flash8
