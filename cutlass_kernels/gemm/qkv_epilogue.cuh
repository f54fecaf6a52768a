// From sums of the product to q8, k8 and v8 in global memory: bias, norm, position, scale and cast of a tile,
// which is 128 tokens of one head. The arithmetic is that of the quantizer (cutlass_kernels/quantize) for an
// x of fp32, and of the norm of the appending kernel (hopper/quantize/new_row.cuh), bit by bit.
//
// A thread holds two rows, 8 apart. Lane q of a quad has columns 8 g + 2 q and 8 g + 2 q + 1 of the 16 groups
// g of eight. So it has both channels of a pair that is to be turned, whether they are neighbours or 64
// apart, and of a norm's sum, which is of every eighth channel in turn, two of the eight.

#pragma once

#include "arch/convert.cuh"
#include "arch/named_barriers.cuh"
#include "arch/quad.cuh"
#include "arch/wgmma.cuh"
#include "bias.cuh"
#include "qkv_walk.cuh"
#include "quantize/arithmetic.cuh"

namespace flash8::gemm {

// The largest magnitudes of the parts that warps have of a tile, of two tiles in turn.
struct TileAmax {
    uint32_t of_warp[2][Config::kConsumerWarps];
};

class QkvEpilogue {
    static constexpr int kHeadDim = Config::kBlockN;
    static constexpr int kGroups = kHeadDim / 8;
    static constexpr int kRows = 2;
    static constexpr int kColumns = 2 * kGroups;  // of a thread in a row
    static constexpr unsigned kAllLanes = 0xffffffff;
    static_assert(kHeadDim == 128 && Config::kBlockM == kScaleBlock && Config::kWaves == 1,
                  "a tile is a head of 128 and a block of its descales");

    using Values = float[kRows][kColumns];

  public:
    // first_row: of this thread, within a tile.
    __device__ QkvEpilogue(QkvParams const& params, TileAmax& amax, int first_row)
        : params_(params), shared_amax_(amax), first_row_(first_row) {}

    __device__ __forceinline__ void finish(TokenBlock const& block, Config::Accumulator& sum) {
        Values y;
        scale(block, sum, y);
        int const first_v = params_.heads_q + params_.heads_kv;
        bool const is_v = block.head >= first_v;
        bool const is_q = block.head < params_.heads_q;
        if (!is_v) {
            float const* const weight = is_q ? params_.q_norm : params_.k_norm;
            if (weight != nullptr) {
                normalise(weight, y);
            }
            if (params_.rope_cos != nullptr) {
                turn(block, y);
            }
        }
        float const descale = quantize::descale_of<false>(largest_of_tile(largest(block, y)));
        float const inverse = quantize::reciprocal(descale);
        if (is_v) {
            int const head = block.head - first_v;
            write_descale(params_.v_descale, block, head, descale);
            store_columns(params_.v, block, head, inverse, y);
        } else {
            int const head = is_q ? block.head : block.head - params_.heads_q;
            write_descale(is_q ? params_.q_descale : params_.k_descale, block, head, descale);
            store_rows(is_q ? params_.q : params_.k, block, head, inverse, y);
        }
    }

  private:
    __device__ __forceinline__ static int quad_lane() { return static_cast<int>(threadIdx.x % 4); }

    // Within the head, of value i of a row.
    __device__ __forceinline__ static int column_of(int i) { return 8 * (i / 2) + 2 * quad_lane() + i % 2; }

    // Token, within its sequence, of row r of this thread.
    __device__ __forceinline__ int token(TokenBlock const& block, int r) const {
        return block.first + first_row_ + 8 * r;
    }

    // The same, or the last one of the sequence.
    __device__ __forceinline__ int readable(TokenBlock const& block, int r) const {
        return min(token(block, r), block.capacity - 1);
    }

    // Three roundings, as the portable code has them.
    __device__ __forceinline__ void scale(TokenBlock const& block, Config::Accumulator& sum,
                                          Values& y) const {
        GemmParams const& gemm = params_.gemm;
        auto const sums = rows_of(sum);
        float of_row[kRows] = {1.0f, 1.0f};
        bool const outer = !Config::kBlockScales && !block.empty();  // which has no row to read
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (outer) {
                of_row[r] = gemm.scale_a.ptr[(block.offset + readable(block, r)) * gemm.scale_a.row_stride];
            }
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            int const column = block.head * kHeadDim + column_of(i);
            float const of_column = outer ? gemm.scale_b.ptr[column * gemm.scale_b.row_stride] : 1.0f;
            float const bias = gemm.bias != nullptr ? bias_of(gemm, column) : 0.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float const x = sums(r, i);
                float const scaled = Config::kBlockScales ? x : __fmul_rn(x, __fmul_rn(of_row[r], of_column));
                y[r][i] = gemm.bias != nullptr ? __fadd_rn(scaled, bias) : scaled;
            }
        }
    }

    // RMSNorm. The sum is of every eighth channel in turn, then by pairs: of a thread, then of its quad.
    __device__ __forceinline__ void normalise(float const* weight, Values& y) const {
        float inverse[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float sums[2] = {};
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                sums[i % 2] = quantize::add(sums[i % 2], quantize::multiply(y[r][i], y[r][i]));
            }
            float sum = quantize::add(sums[0], sums[1]);
            sum = quantize::add(sum, __shfl_xor_sync(kAllLanes, sum, 1));
            sum = quantize::add(sum, __shfl_xor_sync(kAllLanes, sum, 2));
            float const mean = quantize::multiply(sum, quantize::reciprocal(kHeadDim));
            inverse[r] = quantize::reciprocal(quantize::square_root(quantize::add(mean, params_.norm_eps)));
        }
#pragma unroll
        for (int i = 0; i < kColumns; i += 2) {
            float2 const of_columns = *reinterpret_cast<float2 const*>(weight + column_of(i));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                y[r][i] = quantize::multiply(quantize::multiply(y[r][i], inverse[r]), of_columns.x);
                y[r][i + 1] = quantize::multiply(quantize::multiply(y[r][i + 1], inverse[r]), of_columns.y);
            }
        }
    }

    // (first, second) becomes (first cos - second sin, first sin + second cos).
    __device__ __forceinline__ static void turn_pair(float& first, float& second, float cos, float sin) {
        float const x = first;
        first = quantize::subtract(quantize::multiply(x, cos), quantize::multiply(second, sin));
        second = quantize::add(quantize::multiply(x, sin), quantize::multiply(second, cos));
    }

    // By the positions of this thread's rows; the nearest one where the tables have none.
    __device__ __forceinline__ void turn(TokenBlock const& block, Values& y) const {
        int64_t const start = params_.rope_offsets != nullptr ? params_.rope_offsets[block.batch] : 0;
        int64_t const last = params_.rope_rows - 1;
        int const half = params_.rotary_dim / 2;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            int64_t const position = max(int64_t{0}, min(start + readable(block, r), last));
            float const* const cos = params_.rope_cos + position * half;
            float const* const sin = params_.rope_sin + position * half;
            if (params_.interleaved != 0) {
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    int const pair = 4 * group + quad_lane();
                    if (pair < half) {
                        turn_pair(y[r][2 * group], y[r][2 * group + 1], cos[pair], sin[pair]);
                    }
                }
            } else {  // all channels turn
#pragma unroll
                for (int i = 0; i < kGroups; i += 2) {
                    float2 const c = *reinterpret_cast<float2 const*>(cos + column_of(i));
                    float2 const s = *reinterpret_cast<float2 const*>(sin + column_of(i));
                    turn_pair(y[r][i], y[r][i + kGroups], c.x, s.x);
                    turn_pair(y[r][i + 1], y[r][i + 1 + kGroups], c.y, s.y);
                }
            }
        }
    }

    // The largest finite magnitude of this thread's tokens that count, as bits, which have the order of
    // magnitudes.
    __device__ __forceinline__ uint32_t largest(TokenBlock const& block, Values const& y) const {
        float found = 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float of_row = 0.0f;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                of_row = quantize::larger_magnitude(of_row, y[r][i]);
            }
            found = quantize::larger_magnitude(found, token(block, r) < block.counted ? of_row : 0.0f);
        }
        uint32_t const bits = __float_as_uint(found);
        return bits < quantize::kInfinity ? bits : largest_finite(block, y);
    }

    // The same if a value is infinite.
    __device__ uint32_t largest_finite(TokenBlock const& block, Values const& y) const {
        uint32_t found = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            bool const counts = token(block, r) < block.counted;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                found = max(found, counts ? quantize::finite_magnitude(y[r][i]) : 0);
            }
        }
        return found;
    }

    // Over both warpgroups. One barrier a tile: who writes the slots of the tile after the next has met all
    // others at the next one, and they have read these before.
    __device__ __forceinline__ uint32_t largest_of_tile(uint32_t value) {
        value = __reduce_max_sync(kAllLanes, value);
        uint32_t (&slots)[Config::kConsumerWarps] = shared_amax_.of_warp[turn_];
        turn_ ^= 1;
        if (threadIdx.x % 32 == 0) {
            slots[threadIdx.x / 32 - 4] = value;  // the first four warps are the producer's
        }
        ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTileAmax), 32 * Config::kConsumerWarps);
        uint32_t found = 0;
#pragma unroll
        for (int warp = 0; warp < Config::kConsumerWarps; ++warp) {
            found = max(found, slots[warp]);
        }
        return found;
    }

    __device__ __forceinline__ static void write_descale(GroupRef const& ref, TokenBlock const& block,
                                                         int head, float descale) {
        if (threadIdx.x == 128) {
            ref.ptr[block.batch * ref.batch_stride + head * ref.head_stride +
                    block.block * ref.block_stride] = descale;
        }
    }

    // A quad has a row, and stores 64 of its channels at a time, 16 bytes a lane.
    __device__ __forceinline__ void store_rows(TensorRef const& out, TokenBlock const& block, int head,
                                               float inverse, Values const& y) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            char* const row = static_cast<char*>(out.ptr) + head * out.head_stride +
                              (block.offset + int64_t{token(block, r)}) * out.row_stride;
#pragma unroll
            for (int first = 0; first < kColumns; first += 16) {
                uint32_t words[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    float const* const x = &y[r][first + 4 * w];
                    words[w] =
                        pack_e4m3(quantize::multiply(x[0], inverse), quantize::multiply(x[1], inverse),
                                  quantize::multiply(x[2], inverse), quantize::multiply(x[3], inverse));
                }
                // Lane w gets two groups: pairs of one are in low halves of words, of the other in high ones.
                transpose_quad(words, quad_lane());
                uint4 const bytes = make_uint4(
                    __byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                    __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
                if (token(block, r) < block.capacity) {
                    *reinterpret_cast<uint4*>(row + 4 * first + 16 * quad_lane()) = bytes;
                }
            }
        }
    }

    // The tile with its keys innermost, in the orders of flash8.tensors.v_colmajor. A warp has 16 keys, lane
    // 4 g + q of them g and g + 8, and stores their 16 bytes of each channel. Words of four keys: those of g
    // and g + 1, of an even g. Keys that do not count are zeros.
    __device__ __forceinline__ void store_columns(TensorRef const& out, TokenBlock const& block, int head,
                                                  float inverse, Values const& y) const {
        int const lane = static_cast<int>(threadIdx.x % 32);
        bool const odd = lane / 4 % 2 != 0;
        bool counts[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            counts[r] = token(block, r) < block.counted;
        }
        auto const scaled = [&](int r, int i) {
            return counts[r] ? quantize::multiply(y[r][i], inverse) : 0.0f;
        };
        char* const keys = static_cast<char*>(out.ptr) + block.batch * out.batch_stride +
                           head * out.head_stride + int64_t{block.block} * kScaleBlock + first_row_ / 16 * 16;
#pragma unroll
        for (int first = 0; first < kGroups; first += 4) {
            uint32_t words[4];  // of channels 8 g + 2 q, or 8 g + 2 q + 1 by an odd lane
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                uint32_t of_group[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    int const i = 2 * (first + w + j);
                    of_group[j] = pack_e4m3(scaled(0, i), scaled(1, i), scaled(0, i + 1), scaled(1, i + 1));
                }
                uint32_t const low = __byte_perm(of_group[0], of_group[1], 0x5410);
                uint32_t const high = __byte_perm(of_group[0], of_group[1], 0x7632);
                uint32_t const own = odd ? high : low;
                uint32_t const other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
                uint32_t const even_key = odd ? other : own;
                uint32_t const odd_key = odd ? own : other;
                words[w] = __byte_perm(even_key, odd_key, 0x5140);
                words[w + 1] = __byte_perm(even_key, odd_key, 0x7362);
            }
            transpose_quad<8>(words, lane / 8);
            int const channel = 8 * (first + lane / 8) + 2 * quad_lane() + static_cast<int>(odd);
            int const row = channel / 16 * 16 + channel % 2 * 8 + channel % 16 / 2;
            *reinterpret_cast<uint4*>(keys + row * out.row_stride) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    QkvParams const& params_;
    TileAmax& shared_amax_;
    int first_row_;
    int turn_ = 0;  // whose slots a tile has
};

}  // namespace flash8::gemm
