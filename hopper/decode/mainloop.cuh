// What one warp does with its tiles of a segment.

#pragma once

#include "../arch/pipeline.cuh"
#include "loader.cuh"
#include "rows.cuh"

#include <cfloat>

namespace flash8 {

// The accumulators of a warp. O and the sums are of 2^(score - reference), scores in log2 units. -FLT_MAX is
// the reference of a row that has seen no key.
template <class Config>
struct Accumulators {
    typename Products<Config>::Out o;
    float reference[Config::kRowTiles][2];
    float sum[Config::kRowTiles][2];  // of this lane's keys

    __device__ void clear() {
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
            for (int c = 0; c < Products<Config>::kOutSteps; ++c) {
                o[n][c][0] = o[n][c][1] = o[n][c][2] = o[n][c][3] = 0.0f;
            }
            reference[n][0] = reference[n][1] = -FLT_MAX;
            sum[n][0] = sum[n][1] = 0.0f;
        }
    }
};

template <class Config>
class Mainloop {
    using Product = Products<Config>;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kRowTiles = Config::kRowTiles;
    static constexpr int kKeySteps = Config::kKeySteps;

  public:
    __device__ Mainloop(DecodeParams const& params, SharedStorage<Config>& shared, Share const& share,
                        int warp)
        : params_(params), shared_(shared), loader_(params, shared, share, warp), warp_(warp) {
        loader_.start();
    }

    // The tiles of a segment that this warp has. Q is in shared memory.
    __device__ void run(Walk<Config> const& walk, Accumulators<Config>& sums) {
        sums.clear();
        Segment const& segment = walk.segment;
        SequenceWork<Config> const& sequence = walk.sequence;
        KeyRange const tiles = segment.of_warp<Config>(warp_);
        if (tiles.begin == tiles.end) {
            return;
        }
        RowScales<Config> scales;
        scales.read(shared_);
        if constexpr (Config::kQInRegisters) {
            read_queries();
        }
        int const common_begin = sequence.common_begin;
        int const common_end = sequence.common_end;
        int const first = sequence.first_tile();
#pragma unroll 1
        for (int tile = first + tiles.begin; tile < first + tiles.end; ++tile) {
            int const position = tile * kBlockN;
            bool const edge = position < common_begin || position + kBlockN > common_end;
            typename Product::Scores s;
            wait();
            Product::scores(s, slot_address(), [&](int step, int n) { return query(step, n); });
            release<Config::kSlots % 2 != 0>();
            if constexpr (Config::kScoreMod) {
                modify(s, position);
            }
            if (edge) {
                mask(s, segment, sequence, position);
            }
            typename Product::Weights p;
            softmax(s, p, scales, sums);
            wait();
            if constexpr (!Config::kGather) {
                if (edge) {
                    clear_hidden(sequence, position);
                }
            }
            Product::out(sums.o, slot_address(), p);
            release<Config::kSlots % 2 == 0>();
        }
    }

  private:
    __device__ __forceinline__ uint32_t slot_address() const {
        return ptx::shared_address(shared_.slots[warp_][state_.stage]);
    }

    __device__ __forceinline__ void wait() {
        if constexpr (Config::kGather) {
            ptx::copy_async_wait<Config::kSlots - 1>();
            __syncwarp();  // the other lanes' copies
        } else {
            ptx::mbarrier_wait(&shared_.full[warp_][state_.stage], state_.parity);
        }
    }

    template <bool kV>
    __device__ __forceinline__ void release() {
        loader_.template fill<kV>(state_.stage);
        state_.advance();
    }

    __device__ void read_queries() {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int step = 0; step < Config::kChannelSteps; ++step) {
                queries_[n][step] = shared_.q[n][step][threadIdx.x % 32];
            }
        }
    }

    __device__ __forceinline__ uint2 query(int step, int n) const {
        if constexpr (Config::kQInRegisters) {
            return queries_[n][step];
        } else {
            return shared_.q[n][step][threadIdx.x % 32];
        }
    }

    // Key 16 i + group + 8 h of a tile, for accumulators 2 h and 2 h + 1.
    __device__ __forceinline__ static int key(int i, int h) {
        return 16 * i + 8 * h + static_cast<int>(threadIdx.x % 32) / 4;
    }

    __device__ __forceinline__ static int row(int n, int r) {
        return 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + r;
    }

    // Softcap and ALiBi; the scores are logits afterwards.
    __device__ void modify(typename Product::Scores& s, int position) const {
        float const cap = params_.scores.softcap;
        float const per_cap = cap > 0.0f ? 1.0f / cap : 0.0f;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float const distance = static_cast<float>(shared_.own_key[row(n, r)] - position);
                float const scale = shared_.score_scale[row(n, r)];
                float const slope = shared_.slope[row(n, r)];
#pragma unroll
                for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float& score = s[i][n][2 * h + r];
                        score *= scale;
                        if (cap > 0.0f) {
                            score = cap * ptx::tanh(score * per_cap);
                        }
                        score -= slope * fabsf(distance - static_cast<float>(key(i, h)));
                    }
                }
            }
        }
    }

    __device__ void mask(typename Product::Scores& s, Segment const& segment,
                         SequenceWork<Config> const& sequence, int position) const {
        typename Config::TileMask const mask(params_, sequence.info);
        int const first = position - sequence.info.offset_k;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                KeyRange const seen =
                    mask.visible_keys(UnitRow::of<Config>(params_, segment, row(n, r)).query);
                int const begin = max(seen.begin, 0) - first;
                int const end = seen.end - first;
#pragma unroll
                for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        bool const visible = key(i, h) >= begin && key(i, h) < end;
                        s[i][n][2 * h + r] = visible ? s[i][n][2 * h + r] : -INFINITY;
                    }
                }
            }
        }
    }

    // Turns scores into P, which becomes the second operand of the next product.
    __device__ __forceinline__ void softmax(typename Product::Scores& s, typename Product::Weights& p,
                                            RowScales<Config> const& scales,
                                            Accumulators<Config>& sums) const {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            float alpha[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float maximum = fmaxf(s[0][n][r], s[0][n][2 + r]);
#pragma unroll
                for (int i = 1; i < kKeySteps; ++i) {
                    maximum = fmaxf(maximum, fmaxf(s[i][n][r], s[i][n][2 + r]));
                }
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) {
                    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, lanes));
                }
                float const scale = Config::kScoreMod ? kLog2E : scales.scale[n][r];
                float const reference = fmaxf(sums.reference[n][r], with_offset(maximum * scale));
                alpha[r] = ptx::exp2(sums.reference[n][r] - reference);
                sums.reference[n][r] = reference;
                float sum = sums.sum[n][r] * alpha[r];
#pragma unroll
                for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float& score = s[i][n][2 * h + r];
                        score = ptx::exp2(score * scale - reference);
                        sum += score;
                    }
                }
                sums.sum[n][r] = sum;
            }
#pragma unroll
            for (int i = 0; i < kKeySteps; ++i) {
                p[i][n].x =
                    ptx::transpose_matrix(ptx::pack_pair<Config::kArithmetic>(s[i][n][0], s[i][n][1]));
                p[i][n].y =
                    ptx::transpose_matrix(ptx::pack_pair<Config::kArithmetic>(s[i][n][2], s[i][n][3]));
            }
            if (__any_sync(0xffffffff, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
                for (int c = 0; c < Product::kOutSteps; ++c) {
                    sums.o[n][c][0] *= alpha[0];
                    sums.o[n][c][1] *= alpha[1];
                    sums.o[n][c][2] *= alpha[0];
                    sums.o[n][c][3] *= alpha[1];
                }
            }
        }
    }

    // The reference that makes P of the largest score 2^kOffset. Where a score's own rounding is coarse, the
    // offset would drown in it, and P might overflow.
    __device__ __forceinline__ static float with_offset(float score) {
        if constexpr (Config::kOffset == 0.0f) {
            return score;
        } else {
            return fabsf(score) < 0x1p24f ? score - Config::kOffset : score;
        }
    }

    // Zeroes the rows of V that no query sees: P is zero there, but 0 * NaN is NaN.
    __device__ void clear_hidden(SequenceWork<Config> const& sequence, int position) {
        constexpr int kVectors = Config::kPanelV / 16;
        int const begin = min(max(sequence.begin - position, 0), kBlockN);
        int const end = min(max(sequence.end - position, begin), kBlockN);
        if (begin == 0 && end == kBlockN) {
            return;
        }
        uint4* const slot = reinterpret_cast<uint4*>(shared_.slots[warp_][state_.stage]);
        int const hidden = begin + kBlockN - end;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < hidden * kVectors; i += 32) {
            // The swizzle permutes within rows of a panel.
            int const vector = i < begin * kVectors ? i : i - begin * kVectors + end * kVectors;
#pragma unroll
            for (int panel = 0; panel < Config::kRowBytesV / Config::kPanelV; ++panel) {
                slot[panel * kBlockN * kVectors + vector] = make_uint4(0, 0, 0, 0);
            }
        }
        ptx::fence_proxy_async();  // before TMA fills the slot again
        __syncwarp();
    }

    DecodeParams const& params_;
    SharedStorage<Config>& shared_;
    Loader<Config> loader_;
    int warp_;
    PipelineState<Config::kSlots> state_;
    typename Product::Queries queries_;
};

}  // namespace flash8
