// Small kernels that ask the hardware how it computes: FP8 and BF16 WGMMA accumulation on chosen
// operands, and the FP8 conversion on every kind of input. The arithmetic that they are compared with
// is in accumulation.py and formats.py.

#include <cstdint>

namespace {

constexpr int kM = 64;
constexpr int kN = 8;
constexpr int kThreads = 128;
constexpr int kRowBytes = 32;  // one k-step of either type: 32 e4m3 or 16 bf16

// Shared memory of the no-swizzle, K-major layout: 8-row by 16-byte core matrices.
__device__ int core_offset(int row, int byte, int rows) {
    return (byte / 16) * rows * 16 + (row / 8) * 128 + (row % 8) * 16 + byte % 16;
}

// A descriptor without swizzle: the start, the distance between core matrices along K (leading) and
// along M or N (stride), all in units of 16 bytes.
__device__ uint64_t descriptor(void const* base, int leading_bytes, int stride_bytes) {
    uint64_t const start = static_cast<uint32_t>(__cvta_generic_to_shared(base));
    return ((start & 0x3FFFF) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
           (static_cast<uint64_t>(stride_bytes >> 4) << 32);
}

struct SharedStorage {
    alignas(128) unsigned char a[kM * kRowBytes];
    alignas(128) unsigned char b[kN * kRowBytes];
};

template <bool kFp8>
__device__ void accumulate(uint64_t a, uint64_t b, float (&d)[4]) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if constexpr (kFp8) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "l"(a), "l"(b));
    } else {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "l"(a), "l"(b));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d = c + a b for one k-step per block. a (64, 32 bytes), b (8, 32 bytes), c and d (64, 8) fp32.
template <bool kFp8>
__device__ void one_step(unsigned char const* a, unsigned char const* b, float const* c, float* d) {
    __shared__ SharedStorage shared;
    int const problem = blockIdx.x;
    a += problem * kM * kRowBytes;
    b += problem * kN * kRowBytes;
    c += problem * kM * kN;
    d += problem * kM * kN;
    for (int i = threadIdx.x; i < kM * kRowBytes; i += kThreads) {
        shared.a[core_offset(i / kRowBytes, i % kRowBytes, kM)] = a[i];
    }
    for (int i = threadIdx.x; i < kN * kRowBytes; i += kThreads) {
        shared.b[core_offset(i / kRowBytes, i % kRowBytes, kN)] = b[i];
    }
    // The generic stores above must be visible to the tensor core before any warp issues the product.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    int const row = (threadIdx.x / 32) * 16 + (threadIdx.x % 32) / 4;
    int const column = (threadIdx.x % 4) * 2;
    float accumulator[4];
    for (int i = 0; i < 4; ++i) {
        accumulator[i] = c[(row + (i / 2) * 8) * kN + column + i % 2];
    }
    uint64_t const a_descriptor = descriptor(shared.a, kM * 16, 128);
    uint64_t const b_descriptor = descriptor(shared.b, kN * 16, 128);
    accumulate<kFp8>(a_descriptor, b_descriptor, accumulator);
    for (int i = 0; i < 4; ++i) {
        d[(row + (i / 2) * 8) * kN + column + i % 2] = accumulator[i];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    fp8_step(unsigned char const* a, unsigned char const* b, float const* c, float* d) {
    one_step<true>(a, b, c, d);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    bf16_step(unsigned char const* a, unsigned char const* b, float const* c, float* d) {
    one_step<false>(a, b, c, d);
}

// bytes[i] = e4m3 of values[i], saturating.
extern "C" __global__ void convert_e4m3(float const* values, unsigned char* bytes, int count) {
    int const i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(values[i]));
        bytes[i] = static_cast<unsigned char>(pair & 0xFF);
    }
}
