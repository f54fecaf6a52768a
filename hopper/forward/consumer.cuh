// A consumer warpgroup: 64 queries of every work tile, from the first product to the store of O.

#pragma once

#include "../arch/named_barriers.cuh"
#include "../attention/softmax.cuh"
#include "../attention/tile_scheduler.cuh"
#include "config.cuh"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "mainloop_fp8.cuh"
#include "mainloop_fp8_overlapped.cuh"
#include "page_loader.cuh"
#include "score_shift.cuh"
#include "zero_unused_rows.cuh"

#include <cute/algorithm/clear.hpp>

namespace flash8 {

template <class Config>
class Consumer {
    using TileMask = typename Config::TileMask;
    using Turns = WarpgroupTurns<Config::kConsumerWarpgroups>;

  public:
    __device__ Consumer(ForwardParams const& params, SharedStorage<Config>& shared, int warpgroup)
        : params_(params), shared_(shared), warpgroup_(warpgroup) {}

    __device__ void run() {
        if constexpr (Config::kTakeTurns) {
            Turns::start(warpgroup_);
        }
        WorkTile tile = next_tile();
        for (; tile.valid(); tile = next_tile()) {
            work(tile);
        }
        if constexpr (Config::kTakeTurns) {
            Turns::finish(warpgroup_);
        }
        int const warp = static_cast<int>(threadIdx.x / 32) - 4;
        zero_unused_rows<Config>(params_, tile.offset_q, blockIdx.x * Config::kConsumerWarps + warp,
                                 gridDim.x * Config::kConsumerWarps);
    }

  private:
    __device__ WorkTile next_tile() { return shared_.tiles.take(tiles_state_); }

    __device__ void work(WorkTile const& tile) {
        auto const info = sequence_of<Config>(params_, tile);
        TileMask const mask(params_, info);
        KeyBlocks const blocks = mask.key_blocks(first_of_cluster<Config::kClusterM>(tile));
        int const row = first_row(tile.m_block);
        // ((2 columns, 2 rows, kHeadDimV / 8), 1, 1)
        auto o = cute::make_tensor<float>(LayoutC<Config::kHeadDimV>{});
        cute::clear(o);
        if constexpr (Config::kFp8) {
            work_fp8(o, info, mask, blocks, tile, row);
        } else {
            EpilogueScales scales;
            if constexpr (Config::kDropout) {
                scales.v_scale = params_.dropout.keep_scale;
            }
            ScoreScales const score = score_scales(info, blocks, tile, scales);
            OnlineSoftmax softmax(score.softmax);
            if (!blocks.empty()) {
                Scores<Config> const scores(params_, info, mask, tile, row);
                Dropout<Config> const dropout(params_, tile, row);
                Mainloop<Config> mainloop(params_, shared_, state_, scores, dropout, warpgroup_);
                mainloop.run(o, softmax, blocks, score.inner);
            }
            Epilogue<Config>::store(params_, info, tile, row, o, softmax, scales);
        }
    }

    struct ScoreScales {
        float inner;    // by which the scores are multiplied before softcap and ALiBi
        float softmax;  // and in the exponential, times log2(e)
    };

    // With softcap the scores are values of tanh, and the cap is their scale. K's descale joins the scale of
    // q . k, V's the last factor of O. An invalid one is NaN, and so are the rows of the tile then.
    __device__ __forceinline__ ScoreScales score_scales(SeqlenInfo const& info, KeyBlocks const& blocks,
                                                        WorkTile const& tile, EpilogueScales& of_o) const {
        ScoreParams const& given = params_.scores;
        float scale = Config::kSoftcap ? given.softmax_scale / given.softcap : given.softmax_scale_log2;
        if constexpr (Config::kWidens) {
            if (!blocks.empty()) {
                int const head_kv = kv_head<Config::kPackGqa>(params_, tile);
                KeyDescale<false> const k_descale(params_.k_descale, info, false, tile.batch, head_kv);
                KeyDescale<false> const v_descale(params_.v_descale, info, false, tile.batch, head_kv);
                // 0 times the -inf of a hidden key would be NaN. And by infinity a row of negative scores
                // would look like one without keys, which NaN does not.
                constexpr float kSmallest = 1.17549435e-38f;
                float const product = scale * checked_descale(k_descale.of(0));
                scale = product == INFINITY ? NAN : product < kSmallest ? kSmallest : product;
                of_o.v_scale = checked_descale(v_descale.of(0));
            }
        }
        if constexpr (Config::kSoftcap) {
            return {scale, given.softcap * kLog2E};
        } else if constexpr (Scores<Config>::kScoresInLog2) {
            return {scale, 1.0f};
        } else {
            return {1.0f, scale};
        }
    }

    template <class Accumulator>
    __device__ __forceinline__ void work_fp8(Accumulator& o, SeqlenInfo info, TileMask const& mask,
                                             KeyBlocks const& blocks, WorkTile tile, int row) {
        using Descale = KeyDescale<Config::kBlockScales>;
        BlockLocalSoftmax softmax;
        EpilogueScales scales;
        if (!blocks.empty()) {
            bool const packed = params_.sequences.cu_seqlens_k != nullptr;
            int const head_kv = kv_head<Config::kPackGqa>(params_, tile);
            Descale const k_descale(params_.k_descale, info, packed, tile.batch, head_kv);
            Descale const v_descale(params_.v_descale, info, packed, tile.batch, head_kv);
            float score_scale[kRowsPerThread];
            // The rows of a thread are of one head and of one block of queries.
            constexpr bool kOneScale =
                Config::kOverlapPV && !Config::kPackGqa && Config::kBlockM == kScaleBlock;
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                QueryRow const query = query_row<Config::kPackGqa>(params_, tile, row + 8 * r);
                float const scale = (Config::kSoftcap ? params_.scores.softmax_scale / params_.scores.softcap
                                                      : params_.scores.softmax_scale_log2) *
                                    q_descale<Config::kBlockScales>(params_, info, tile.batch, query);
                score_scale[r] = kOneScale && r > 0 ? score_scale[0] : scale;
            }
            if (params_.k_mean.ptr != nullptr) {
                keep_score_shift(tile, head_kv, score_scale);
            }
            Scores<Config> const scores(params_, info, mask, tile, row, kept_rows());
            float const k_largest = k_descale.largest(blocks.begin, blocks.end);
            poison(o, score_scale, k_largest, v_descale.largest(blocks.begin, blocks.end));
            bool const large = scores_may_be_large(scores, info, score_scale, k_largest);
            Dropout<Config> const dropout(params_, tile, row);
            if constexpr (Config::kOverlapPV) {
                keep(tile, info, v_descale.of(blocks.begin));
                MainloopFp8Overlapped<Config> mainloop(params_, shared_, state_, scores, dropout, warpgroup_);
                mainloop.run(o, softmax, blocks, score_scale, large, k_descale);
                scales.v_scale = take_back(tile, info);
            } else {
                MainloopFp8<Config> mainloop(params_, shared_, state_, scores, dropout, warpgroup_);
                scales.v_scale = mainloop.run(o, softmax, blocks, score_scale, large, k_descale, v_descale);
            }
            scales.v_scale = checked_descale(scales.v_scale);
            if constexpr (Config::kDropout) {
                scales.v_scale *= params_.dropout.keep_scale;
            }
            if (params_.k_mean.ptr != nullptr) {
                scales.score_shift[0] = shared_.score_shift[tile_row()];
                scales.score_shift[1] = shared_.score_shift[tile_row() + 8];
            }
        }
        Epilogue<Config>::store(params_, info, tile, first_row(tile.m_block), o, softmax, scales);
    }

    // Puts what is needed again after the mainloop into shared memory while it runs. The warp has met since
    // it read this of the tile before (TileQueue::take).
    __device__ __forceinline__ void keep(WorkTile const& tile, SeqlenInfo const& info, float v_scale) {
        if (threadIdx.x % 32 == 0) {
            kept_tile() = {tile, info, v_scale, state_.q.parity ^ 1, tiles_state_.parity};
        }
        __syncwarp();
    }
    // Returns v_scale.
    __device__ __forceinline__ float take_back(WorkTile& tile, SeqlenInfo& info) {
        KeptTile const& kept = kept_tile();
        tile = kept.tile;
        info = kept.info;
        // ptxas takes the result of a shuffle to be the same in the whole warp. Otherwise no loop over tiles
        // would have uniform registers.
        state_.q.parity = __shfl_sync(0xffffffff, kept.parity_q, 0);
        tiles_state_.parity = __shfl_sync(0xffffffff, kept.parity_tiles, 0);
        return kept.v_scale;
    }
    __device__ __forceinline__ KeptTile& kept_tile() const {
        return shared_.kept_tiles[ptx::thread_index() / 32 - 4];
    }

    __device__ __forceinline__ KeptRows* kept_rows() const {
        if constexpr (Config::kOverlapPV) {
            return shared_.kept_rows;
        } else {
            return nullptr;
        }
    }

    // An invalid descale gives NaN in O and, except V's, in LSE. The NaN stays there: 0 * NaN is NaN.
    template <class Accumulator>
    __device__ __forceinline__ static void poison(Accumulator& o, float (&score_scale)[kRowsPerThread],
                                                  float k_largest, float v_largest) {
        if (isnan(k_largest)) {
            score_scale[0] = score_scale[1] = k_largest;
        }
        if (isnan(v_largest)) {
            cute::fill(o, v_largest);
        }
    }

    // Whether the descales allow a score of this warpgroup's rows that is too large for the unmasked loop.
    // Its threads vote, because they must run the same loops.
    __device__ __forceinline__ bool scores_may_be_large(Scores<Config> const& scores, SeqlenInfo const& info,
                                                        float const (&score_scale)[kRowsPerThread],
                                                        float k_largest) const {
        constexpr float kLargestProduct = 448.0f * 448.0f * Config::kHeadDim;
        float const scale = fmaxf(score_scale[0], score_scale[1]) * k_largest;
        float const penalty = scores.largest_penalty(info);
        float const bound = Config::kSoftcap ? params_.scores.softcap * kLog2E * (1.0f + penalty)
                                             : scale * kLargestProduct + penalty;
        int const barrier = static_cast<int>(NamedBarrier::kWarpgroupVote) + warpgroup_;
        bool const large = ptx::named_barrier_any(barrier, 128, bound >= BlockLocalSoftmax::kLargest);
        // ptxas takes the result of this shuffle to be the same in the whole warp, and so keeps descriptors
        // in uniform registers.
        return __shfl_sync(0xffffffff, static_cast<int>(large), 0) != 0;
    }

    // Before the mainloop releases Q. The shift is kept in shared memory, since registers are short.
    __device__ void keep_score_shift(WorkTile const& tile, int head_kv,
                                     float const (&log2_scale)[kRowsPerThread]) {
        shared_.pipeline_q.wait(state_.q);
        ChannelRef const& mean = params_.k_mean;
        float shift[kRowsPerThread];
        score_shift<Config>(shift, shared_.q,
                            mean.ptr + tile.batch * mean.batch_stride + head_kv * mean.head_stride,
                            params_.head_dim, tile_row(), log2_scale);
        if (threadIdx.x % 4 == 0) {
            shared_.score_shift[tile_row()] = shift[0];
            shared_.score_shift[tile_row() + 8] = shift[1];
        }
        __syncwarp();  // a warp reads only its own rows
    }

    // The first of this thread's two rows, in the tile and in the sequence.
    __device__ __forceinline__ int tile_row() const {
        int const thread = Config::kOverlapPV ? ptx::thread_index() : static_cast<int>(threadIdx.x);
        int const warp = (thread % 128) / 32;
        return warpgroup_ * 64 + warp * 16 + (thread % 32) / 4;
    }
    __device__ __forceinline__ int first_row(int m_block) const {
        return m_block * Config::kBlockM + tile_row();
    }

    ForwardParams const& params_;
    SharedStorage<Config>& shared_;
    int warpgroup_;
    PipelineState<1> tiles_state_;
    ConsumerState<Config> state_;
};

}  // namespace flash8
