// HMMA.16816 (mma.sync.m16n8k16, fp16 in, fp32 out) alone and beside the conversions that make its A
// operand from e4m3, as a decoding kernel over an FP8 cache issues them: four a product.

#include <cstdint>

namespace {

constexpr int kChains = 4;

__device__ void product(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two e4m3 values, in the low half, to fp16.
__device__ void unpack(uint32_t& pair) {
    asm volatile("{\n.reg .b16 low;\ncvt.u16.u32 low, %0;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "+r"(pair));
}

// Every conversion's operand is the result of an earlier one: of operands that repeat ptxas would
// convert one. B is all ones. `a` (threads, 16) holds the registers of A in the end, `d` (threads, 16)
// the sums.
template <bool kUnpacks, bool kProducts>
__device__ void run(uint32_t* a, float* d, long long* cycles, int iterations) {
    uint32_t operand[kChains][4];
    uint32_t const ones[2] = {0x3C003C00u, 0x3C003C00u};
    float sum[kChains][4] = {};
#pragma unroll
    for (int i = 0; i < kChains * 4; ++i) {
        operand[i / 4][i % 4] = 0x3830u + (threadIdx.x + i) % 64;
    }
    __syncthreads();
    long long const start = clock64();
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (kUnpacks) {
                    unpack(operand[i][j]);
                }
            }
            if constexpr (kProducts) {
                product(sum[i], operand[i], ones);
            }
        }
    }
    __syncthreads();
    long long const end = clock64();
    int const first = (blockIdx.x * blockDim.x + threadIdx.x) * kChains * 4;
#pragma unroll
    for (int i = 0; i < kChains * 4; ++i) {
        a[first + i] = operand[i / 4][i % 4];
        d[first + i] = sum[i / 4][i % 4];
    }
    if (threadIdx.x == 0) {
        cycles[blockIdx.x] = end - start;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512)
    mma_alone(uint32_t* a, float* d, long long* cycles, int iterations) {
    run<false, true>(a, d, cycles, iterations);
}

extern "C" __global__ void __launch_bounds__(512)
    mma_unpacked(uint32_t* a, float* d, long long* cycles, int iterations) {
    run<true, true>(a, d, cycles, iterations);
}

extern "C" __global__ void __launch_bounds__(512)
    unpack_alone(uint32_t* a, float* d, long long* cycles, int iterations) {
    run<true, false>(a, d, cycles, iterations);
}
