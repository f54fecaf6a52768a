// The rates of single instructions of the arithmetic pipes: independent chains, all warps of one CTA.
// cycles[block] is what the CTA took; facts.py divides. The results go to `sink`, so that a wrong
// program does not pass for a fast one.

#include <cstdint>

namespace {

constexpr int kChains = 8;

template <class Step>
__device__ void run(uint32_t (&x)[kChains], uint32_t* sink, long long* cycles, int iterations, Step step) {
    __syncthreads();
    long long const start = clock64();
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) {
            step(x[i]);
        }
    }
    __syncthreads();
    long long const end = clock64();
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        sink[(blockIdx.x * blockDim.x + threadIdx.x) * kChains + i] = x[i];
    }
    if (threadIdx.x == 0) {
        cycles[blockIdx.x] = end - start;
    }
}

}  // namespace

// x = 2^x, from fp32 values near -1, so that the chain stays finite.
extern "C" __global__ void __launch_bounds__(1024)
    ex2_f32(uint32_t* sink, long long* cycles, int iterations) {
    uint32_t x[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        x[i] = __float_as_uint(-1.0f - 0.001f * static_cast<float>(threadIdx.x + i));
    }
    run(x, sink, cycles, iterations, [](uint32_t& value) {
        float f = __uint_as_float(value);
        asm volatile("{\n.reg .f32 y;\nneg.f32 y, %0;\nex2.approx.ftz.f32 %0, y;\n}" : "+f"(f));
        value = __float_as_uint(f);
    });
}

// The same for two fp16 values at once.
extern "C" __global__ void __launch_bounds__(1024)
    ex2_f16x2(uint32_t* sink, long long* cycles, int iterations) {
    uint32_t x[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        x[i] = 0x3C003800u + 0x00010001u * ((threadIdx.x + i) & 127);
    }
    run(x, sink, cycles, iterations, [](uint32_t& value) {
        asm volatile("{\n.reg .b32 y;\nxor.b32 y, %0, 0x80008000;\nex2.approx.f16x2 %0, y;\n}" : "+r"(value));
    });
}

// Two e4m3 values to fp16: the low half of the result is the next operand.
extern "C" __global__ void __launch_bounds__(1024)
    unpack_e4m3(uint32_t* sink, long long* cycles, int iterations) {
    uint32_t x[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        x[i] = 0x3830u + (threadIdx.x + i) % 64;
    }
    run(x, sink, cycles, iterations, [](uint32_t& value) {
        asm volatile("{\n.reg .b16 low;\ncvt.u16.u32 low, %0;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}"
                     : "+r"(value));
    });
}
