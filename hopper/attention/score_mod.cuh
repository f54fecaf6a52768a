// What happens to a tile of scores between Q K^T and the softmax: softcap, ALiBi, the mask.

#pragma once

#include "../arch/ptx.cuh"
#include "../arch/wgmma.cuh"
#include "alibi.cuh"
#include "pack_gqa.cuh"
#include "softmax.cuh"
#include "tile_scheduler.cuh"

namespace flash8 {

// What a thread's rows need in masked blocks only, where its mainloop has no registers for that.
struct alignas(16) KeptRows {
    KeyRange keys[kRowsPerThread];
};

template <class Config>
class Scores {
    using TileMask = typename Config::TileMask;
    static constexpr bool kKeepsRows = Config::kOverlapPV;

  public:
    // Whether the scores come out in log2 units. Scores of e4m3 are otherwise multiplied by the descales of Q
    // and of K's block only in the softmax. An ALiBi slope needs units that are the same for every block, and
    // that do not vanish with a descale.
    static constexpr bool kScoresInLog2 = Config::kHasDescales && Config::kAlibi && !Config::kSoftcap;

    // first_row: the first of this thread's two rows. kept: in shared memory, of all consumer threads.
    template <class Params>
    __device__ Scores(Params const& params, SeqlenInfo const& info, TileMask const& mask,
                      WorkTile const& tile, int first_row, KeptRows* kept = nullptr) {
        if constexpr (kKeepsRows) {
            kept_ = ptx::shared_address(kept) - 128 * sizeof(KeptRows);  // 128 threads produce
        }
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            QueryRow const row = query_row<Config::kPackGqa>(params, tile, first_row + 8 * r);
            if constexpr (kKeepsRows) {
                keep_keys(r, mask.visible_keys(row.query));
            } else {
                keys_[r] = mask.visible_keys(row.query);
            }
            if constexpr (Config::kAlibi) {
                float const unit = kScoresInLog2      ? kLn2
                                   : Config::kSoftcap ? params.scores.softcap
                                                      : params.scores.softmax_scale;
                int const position = row.query + info.seqlen_k - info.seqlen_q;
                alibi_[r] = AlibiRow::read(params.scores, tile.batch, row.head, position, unit);
            }
        }
    }

    // The most that ALiBi subtracts from a score of this thread's rows, in the units of the scores then.
    __device__ float largest_penalty(SeqlenInfo const& info) const {
        float steepest = 0.0f;
        if constexpr (Config::kAlibi) {
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                steepest = fmaxf(steepest, fabsf(alibi_[r].slope));
            }
        }
        return steepest * static_cast<float>(info.seqlen_q + info.seqlen_k);
    }

    // With softcap the scores become tanh(scale * s), and the softmax multiplies by the cap. With
    // kScoresInLog2, `scale` turns them into log2 units.
    template <bool kMasked, class Accumulator>
    __device__ __forceinline__ void apply(Accumulator& s, int n_block,
                                          float const (&scale)[kRowsPerThread]) const {
        auto rows = rows_of(s);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            if constexpr (Config::kSoftcap) {
#pragma unroll
                for (int i = 0; i < cute::size<1>(rows); ++i) {
                    rows(r, i) = ptx::tanh(rows(r, i) * scale[r]);
                }
            }
            auto row = cute::make_tensor(rows(r, cute::_).data(), cute::get<1>(rows.layout()));
            if constexpr (Config::kAlibi) {
                alibi_[r].template apply<Config::kBlockN>(row, n_block, kScoresInLog2 ? scale[r] : 1.0f);
            }
            if constexpr (kMasked) {
                TileMask::apply(row, kKeepsRows ? kept_keys(r) : keys_[r], n_block);
            }
        }
    }

  private:
    // By address and thread, since the compiler would keep a pointer in registers round the loop. Each thread
    // reads what it has written.
    __device__ __forceinline__ uint32_t kept_at(int r) const {
        return kept_ + static_cast<uint32_t>(threadIdx.x * sizeof(KeptRows) + r * sizeof(KeyRange));
    }
    __device__ __forceinline__ void keep_keys(int r, KeyRange const& keys) const {
        asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(kept_at(r)), "r"(keys.begin), "r"(keys.end)
                     : "memory");
    }
    __device__ __forceinline__ KeyRange kept_keys(int r) const {
        KeyRange keys;
        asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];"
                     : "=r"(keys.begin), "=r"(keys.end)
                     : "r"(kept_at(r))
                     : "memory");
        return keys;
    }

    uint32_t kept_ = 0;
    KeyRange keys_[kRowsPerThread];
    AlibiRow alibi_[kRowsPerThread];
};

}  // namespace flash8
