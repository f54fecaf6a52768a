// FP8 products need both operands K-major, so V (key, channel) must become (channel, key). Three warps of the
// producer warpgroup transpose it, tile by tile, between TMA and the consumers.
//
//   TMA -> v_rows -> ldmatrix.trans, byte permutes, stmatrix -> v -> wgmma
//
// ldmatrix transposes pairs of bytes. Splitting the pairs leaves two permutations, and both are useful:
//   - Keys, within each 16: place 4 t + 2 j + c holds key 8 j + 2 t + c. A thread's scores, columns
//     2 t + c of column group j, are then in the order in which the product P V wants its A operand.
//   - Channels, within each 16: row 8 h + g holds channel 2 g + h. The rows of a stmatrix do not conflict in
//     banks, and a thread's accumulators of two column groups are four neighbouring channels of O
//     (epilogue.cuh).

#pragma once

#include "../arch/ptx.cuh"
#include "../arch/swizzled_tile.cuh"
#include "../attention/hidden_keys.cuh"
#include "../attention/pack_gqa.cuh"
#include "../attention/tile_scheduler.cuh"
#include "config.cuh"
#include "page_loader.cuh"

namespace flash8 {

template <class Config>
class Transposer {
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kKeys = 32;  // of one ldmatrix: a lane names the row of one key
    static constexpr int kChannels = 16;
    static constexpr int kInFlight = 2;  // loads before the first store that waits for one
    using TileV = SwizzledTile<kBlockN, Config::kPanelV>;
    using TileVt = SwizzledTile<Config::kHeadDimV, panel_bytes(kBlockN)>;

  public:
    // warp: 0 .. kTransposerWarps - 1.
    __device__ Transposer(ForwardParams const& params, SharedStorage<Config>& shared, int warp)
        : params_(params), shared_(shared), warp_(warp) {}

    __device__ void run() {
        for (WorkTile tile = shared_.tiles.take(tiles_); tile.valid(); tile = shared_.tiles.take(tiles_)) {
            auto const info = sequence_of<Config>(params_, tile);
            typename Config::TileMask const mask(params_, info);
            KeyBlocks const blocks = mask.key_blocks(first_of_cluster<Config::kClusterM>(tile));
            if (!blocks.empty()) {
                clear_hidden_keys(blocks, blocks.end - 1);
            }
#pragma unroll 1
            for (int count = blocks.end - blocks.begin; count > 0; --count) {
                if constexpr (Config::kMask == MaskMode::kLocal) {
                    if (count == 1 && blocks.begin + 1 < blocks.end) {
                        clear_hidden_keys(blocks, blocks.begin);
                    }
                }
                transpose();
            }
        }
    }

  private:
    // Of the next block, which is in the next stage. Gathered keys are zero where they are hidden.
    __device__ __forceinline__ void clear_hidden_keys(KeyBlocks const& blocks, int n_block) {
        if constexpr (Config::kGather) {
            return;
        }
        SeenKeys const seen = SeenKeys::of<kBlockN>(blocks, n_block);
        if (seen.all<kBlockN>()) {
            return;
        }
        shared_.pipeline_v_rows.wait(state_);
        constexpr int kPanelBytes = Config::kPanelV;  // elements are bytes
        flash8::clear_hidden_keys<kBlockN, kPanelBytes, Config::kHeadDimV / kPanelBytes,
                                  Config::kTransposerWarps * 32>(
            shared_.v_rows + state_.stage * Config::kBytesV, seen, threadIdx.x - 32);
    }

    __device__ __forceinline__ void transpose() {
        shared_.pipeline_v_rows.wait(state_);
        shared_.pipeline_v.wait_empty(state_);
        int const lane = threadIdx.x % 32;
        int const matrix = lane / 8;
        uint32_t const from = ptx::shared_address(shared_.v_rows) + state_.stage * Config::kBytesV;
        uint32_t const to = ptx::shared_address(shared_.v) + state_.stage * Config::kBytesV;
#pragma unroll 1
        for (int channel = warp_ * kChannels; channel < Config::kHeadDimV;
             channel += Config::kTransposerWarps * kChannels) {
            uint32_t const source = from + TileV::offset(lane, channel);
            uint32_t const target =
                to + TileVt::offset(channel + 8 * (matrix % 2) + lane % 8, 16 * (matrix / 2));
#pragma unroll
            for (int first = 0; first < kBlockN; first += kInFlight * kKeys) {
                uint32_t words[kInFlight][4];
#pragma unroll
                for (int i = 0; i < kInFlight && first + i * kKeys < kBlockN; ++i) {
                    int const key = first + i * kKeys;
                    ptx::load_matrices_transposed(words[i], source + key * Config::kPanelV);
                }
#pragma unroll
                for (int i = 0; i < kInFlight && first + i * kKeys < kBlockN; ++i) {
                    split_pairs(words[i]);
                    ptx::store_matrices(TileVt::advance(target, first + i * kKeys), words[i]);
                }
            }
        }
        shared_.pipeline_v.commit(state_);
        release_and_advance<Config::kClusterM>(shared_.pipeline_v_rows, state_);
    }

    // In lane 4 g + t, words[i] holds channels 2 g and 2 g + 1 of keys 8 i + 2 t and 8 i + 2 t + 1.
    // Afterwards words[0] and words[1] hold channel 2 g and channel 2 g + 1 of keys {2 t, 2 t + 1, 8 + 2 t, 9
    // + 2 t}, words[2] and words[3] those of the next 16 keys.
    __device__ __forceinline__ static void split_pairs(uint32_t (&words)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t const first = words[i];
            words[i] = __byte_perm(first, words[i + 1], 0x6420);
            words[i + 1] = __byte_perm(first, words[i + 1], 0x7531);
        }
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warp_;
    PipelineState<1> tiles_;
    PipelineState<Config::kStages> state_;  // of v_rows, which TMA fills, and of v, which these warps fill
};

}  // namespace flash8
