// The rate of wgmma by tile and by where A is, alone and beside stores to shared memory: does an
// operand cost what its bytes say, and do stores take from it? Two warpgroups multiply, each with
// an A of its own and the same B; a third one stores 16 bytes a thread, `stores` times for every
// four products. cycles[block] = {the multiplying warpgroups', the storing one's}.

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace {

constexpr int kM = 64;
constexpr int kSliceK = 16;
constexpr int kSlices = 4;  // 64 channels of bf16: one row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kWarpgroup = 128;
constexpr int kRepeats = 8;  // times over the slices, between two waits
constexpr int kThreads = 3 * kWarpgroup;

template <int kN>
struct SharedStorage {
    alignas(1024) unsigned char a[2][kM * kRowBytes];
    alignas(1024) unsigned char b[kN * kRowBytes];
    alignas(128) uint4 stored[kWarpgroup];
};

// K-major with the swizzle of 128 bytes: groups of 8 rows lie 1024 bytes apart.
__device__ uint64_t descriptor(void const* base) {
    uint64_t const start = static_cast<uint32_t>(__cvta_generic_to_shared(base));
    return ((start & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// `rows` rows of 64 bf16 values, from row-major global memory.
__device__ void load(unsigned char* tile, uint16_t const* from, int rows) {
    for (int i = threadIdx.x; i < rows * 64; i += kThreads) {
        int const byte = i * 2;
        int const swizzled = byte ^ (((byte >> 7) & 7) << 4);
        *reinterpret_cast<uint16_t*>(tile + swizzled) = from[i];
    }
}

template <class Atom, std::size_t... I>
__device__ void multiply(uint64_t a, uint64_t b, float (&d)[sizeof...(I)], std::index_sequence<I...>) {
    Atom::fma(a, b, d[I]..., cute::SM90::GMMA::ScaleOut::One);
}

template <class Atom, std::size_t... I>
__device__ void multiply(uint32_t const (&a)[4], uint64_t b, float (&d)[sizeof...(I)],
                         std::index_sequence<I...>) {
    Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., cute::SM90::GMMA::ScaleOut::One);
}

// Two bf16 values of A for register r of this thread in slice k: row-major global memory again.
__device__ uint32_t fragment(uint16_t const* a, int k, int r) {
    int const thread = threadIdx.x % kWarpgroup;
    int const row = (thread / 32) * 16 + (thread % 32) / 4 + (r % 2) * 8;
    int const column = k * kSliceK + (thread % 4) * 2 + (r / 2) * 8;
    return *reinterpret_cast<uint32_t const*>(a + row * 64 + column);
}

template <int kN, bool kRegisterA, class Atom>
__device__ long long products(SharedStorage<kN>& shared, uint16_t const* a, float* d, int iterations) {
    constexpr int kValues = kN / 2;
    constexpr auto kAll = std::make_index_sequence<kValues>{};
    int const warpgroup = threadIdx.x / kWarpgroup;
    uint64_t const a_descriptor = descriptor(shared.a[warpgroup]);
    uint64_t const b_descriptor = descriptor(shared.b);
    float accumulator[kValues] = {};
    uint32_t operand[kSlices][4];
    if constexpr (kRegisterA) {
#pragma unroll
        for (int i = 0; i < kSlices * 4; ++i) {
            operand[i / 4][i % 4] = fragment(a + warpgroup * kM * 64, i / 4, i % 4);
        }
    }
    long long const start = clock64();
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            cute::warpgroup_fence_operand(accumulator[i]);
        }
        cute::warpgroup_arrive();
#pragma unroll
        for (int i = 0; i < kRepeats * kSlices; ++i) {
            int const k = i % kSlices;
            uint64_t const b = b_descriptor + k * (kSliceK * 2 >> 4);
            if constexpr (kRegisterA) {
                multiply<Atom>(operand[k], b, accumulator, kAll);
            } else {
                multiply<Atom>(a_descriptor + k * (kSliceK * 2 >> 4), b, accumulator, kAll);
            }
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            cute::warpgroup_fence_operand(accumulator[i]);
        }
    }
    long long const end = clock64();
    int const thread = threadIdx.x % kWarpgroup;
    int const row = (thread / 32) * 16 + (thread % 32) / 4;
    d += ((blockIdx.x * 2 + warpgroup) * kM) * kN;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        d[(row + (i / 2 % 2) * 8) * kN + (i / 4) * 8 + (thread % 4) * 2 + i % 2] = accumulator[i];
    }
    return end - start;
}

// a (2, 64, 64), b (kN, 64) bf16; d (blocks, 2, 64, kN) fp32 = 8 * iterations * a b^T.
template <int kN, bool kRegisterA, class Atom>
__device__ void run(uint16_t const* a, uint16_t const* b, float* d, long long* cycles, int iterations,
                    int stores) {
    __shared__ SharedStorage<kN> shared;
    load(shared.a[0], a, kM);
    load(shared.a[1], a + kM * 64, kM);
    load(shared.b, b, kN);
    // The generic stores above must be visible to the tensor cores before any warp issues a product.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    int const warpgroup = threadIdx.x / kWarpgroup;
    long long taken = 0;
    if (warpgroup < 2) {
        taken = products<kN, kRegisterA, Atom>(shared, a, d, iterations);
    } else {
        uint32_t const target =
            static_cast<uint32_t>(__cvta_generic_to_shared(&shared.stored[threadIdx.x % kWarpgroup]));
        long long const start = clock64();
        for (int n = 0; n < iterations * kRepeats; ++n) {
            for (int i = 0; i < stores; ++i) {
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(n) : "memory");
            }
        }
        taken = clock64() - start;
    }
    if (threadIdx.x % kWarpgroup == 0 && warpgroup > 0) {
        cycles[blockIdx.x * 2 + warpgroup - 1] = taken;
    }
}

}  // namespace

#define FLASH8_WGMMA(NAME, N, REGISTER_A, ATOM)                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) NAME(                                         \
        uint16_t const* a, uint16_t const* b, float* d, long long* cycles, int iterations, int stores) {    \
        run<N, REGISTER_A, cute::SM90::GMMA::ATOM<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>>( \
            a, b, d, cycles, iterations, stores);                                                           \
    }

FLASH8_WGMMA(wgmma_n64_shared, 64, false, MMA_64x64x16_F32BF16BF16_SS)
FLASH8_WGMMA(wgmma_n64_registers, 64, true, MMA_64x64x16_F32BF16BF16_RS)
FLASH8_WGMMA(wgmma_n128_shared, 128, false, MMA_64x128x16_F32BF16BF16_SS)
FLASH8_WGMMA(wgmma_n192_shared, 192, false, MMA_64x192x16_F32BF16BF16_SS)
