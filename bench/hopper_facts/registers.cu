// setmaxnreg: a warpgroup gives registers back, two ask for more. CTAs of 384 threads are launched with
// 168 registers a thread, 504 for the three: asks of at most that end, and more waits for ever.
// The name of a kernel is what its warpgroups ask for.

#include <cstdint>

namespace {

constexpr int kThreads = 384;

template <int kGiven, int kAsked>
__device__ void exchange(int* done) {
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGiven));
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kAsked));
    }
    done[blockIdx.x * kThreads + threadIdx.x] = threadIdx.x < 128 ? kGiven : kAsked;
}

}  // namespace

#define FLASH8_REGISTERS(GIVEN, ASKED)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) registers_##GIVEN##_##ASKED(int* done) { \
        exchange<GIVEN, ASKED>(done);                                                                  \
    }

FLASH8_REGISTERS(24, 240)
FLASH8_REGISTERS(40, 232)
FLASH8_REGISTERS(48, 232)
FLASH8_REGISTERS(56, 224)
FLASH8_REGISTERS(56, 232)
