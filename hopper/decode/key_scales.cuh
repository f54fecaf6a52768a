// Descales that keys have for themselves: one for each place of the cache, for 128 places of a row, or for a
// page. A column of scores is multiplied by K's, a column of P by V's.
//
// The loader copies those of a tile together with K, into a ring of each warp. The warp checks them before it
// uses them. V's are stored as multiples of a unit, a power of two that grows with the largest V has: so P
// fills the range of fp16 whatever the descales are, and O and P are in this unit.
//
// Of a tile, those of keys 8 n + g lie side by side for a group g, as its lanes read them.

#pragma once

#include "../attention/pages.cuh"
#include "../clamp.cuh"
#include "storage.cuh"

#include <cfloat>

namespace flash8 {

// What stands for V's descale of a key that no query sees: the smallest, which no unit grows for.
constexpr float kUnseenScaleV = 0x1p-126f;

template <class Config>
class KeyScaleLoader {
    static constexpr int kBlockN = Config::kBlockN;

  public:
    __device__ explicit KeyScaleLoader(DecodeParams const& params) : params_(params) {}

    // Asks for the descales of a key. Those of keys that no query sees are not read.
    __device__ __forceinline__ void copy(TileScales<Config>& scales, int key, KeyPlace const& place, int head,
                                         bool seen) const {
        int const at = TileScales<Config>::place(key);
        copy_one(&scales.k[at], params_.k_descale, params_.k_scale_rows, place, head, seen, 1.0f);
        copy_one(&scales.v[at], params_.v_descale, params_.v_scale_rows, place, head, seen, kUnseenScaleV);
    }

  private:
    __device__ __forceinline__ static void copy_one(float* target, DescaleRef const& ref, int rows,
                                                    KeyPlace const& place, int head, bool seen,
                                                    float otherwise) {
        if (rows == 0 || !seen) {
            *target = rows == 0 ? 1.0f : otherwise;
            return;
        }
        ptx::copy_async_4(ptx::shared_address(target),
                          ref.ptr + place.page * ref.batch_stride + head * ref.head_stride +
                              (place.row >> (31 - __clz(rows))) * ref.block_stride);
    }

    DecodeParams const& params_;
};

struct NoKeyScales {
    template <class... Given>
    __device__ explicit NoKeyScales(Given&&...) {}
    __device__ void clear() {}
};

// Those of the tile that a warp works on.
template <class Config>
class KeyScales {
    static constexpr int kPerLane = Config::kBlockN / 32;
    static constexpr int kPerGroup = Config::kBlockN / 8;

  public:
    __device__ KeyScales(SharedStorage<Config>& shared, int warp) : shared_(shared), warp_(warp) {}

    // Of a new segment.
    __device__ void clear() { unit_ = FLT_MIN; }

    // What O is to be multiplied by in the end.
    __device__ float unit() const { return unit_; }

    // To the next tile, whose descales have arrived. Returns the factor that takes O to the unit of V's.
    __device__ __forceinline__ float enter() {
        TileScales<Config>& tile = here();
        int const first = kPerLane * static_cast<int>(threadIdx.x % 32);
        uint32_t largest = 0;
        float v[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            tile.k[first + i] = checked_descale(tile.k[first + i]);
            v[i] = checked_descale(tile.v[first + i]);
            largest = max(largest, __float_as_uint(v[i]));  // NaN is above all
        }
        largest = min(__reduce_max_sync(0xffffffff, largest), 0x7e800000u);
        // Its power of two, from 2^-126 to 2^126.
        float const unit = fmaxf(unit_, __uint_as_float(largest & 0x7f800000u));
        float const inverse = __uint_as_float(0x7f000000u - __float_as_uint(unit));
        float const change = unit_ * inverse;
        unit_ = unit;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            tile.v[first + i] = v[i] * inverse;
        }
        __syncwarp();
        return change;
    }

    // Past the tile.
    __device__ __forceinline__ void leave() { stage_ = stage_ + 1 == Config::kScaleStages ? 0 : stage_ + 1; }

    // Of this lane's keys: `act` (step, half, descale).
    template <class Act>
    __device__ __forceinline__ void each_k(Act const& act) const {
        each(here().k, act);
    }

    template <class Act>
    __device__ __forceinline__ void each_v(Act const& act) const {
        each(here().v, act);
    }

  private:
    __device__ __forceinline__ TileScales<Config>& here() const { return shared_.scales.of[warp_][stage_]; }

    template <class Act>
    __device__ __forceinline__ static void each(float const* values, Act const& act) {
        float const* const own = values + kPerGroup * (static_cast<int>(threadIdx.x % 32) / 4);
#pragma unroll
        for (int i = 0; i < kPerGroup; i += 4) {
            float4 const four = *reinterpret_cast<float4 const*>(own + i);
            act(i / 2, 0, four.x);
            act(i / 2, 1, four.y);
            act(i / 2 + 1, 0, four.z);
            act(i / 2 + 1, 1, four.w);
        }
    }

    SharedStorage<Config>& shared_;
    int warp_;
    int stage_ = 0;
    float unit_ = FLT_MIN;
};

}  // namespace flash8
