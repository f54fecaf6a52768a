// setmaxnreg: a warpgroup gives registers back, two ask for more. CTAs of 384 threads are launched with
// 168 registers a thread, 504 for the three: asks of at most that end, and more waits for ever.
// The name of a kernel is what its warpgroups ask for.

#include <cstdint>

namespace {

constexpr int kThreads = 384;

}  // namespace

// ASKED_HEX is ASKED once more: flash8's compiler refuses a kernel that asks for too much, which here is
// the question, and does not read hexadecimal.
#define FLASH8_REGISTERS(GIVEN, ASKED, ASKED_HEX)                                                      \
    static_assert(ASKED == ASKED_HEX);                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) registers_##GIVEN##_##ASKED(int* done) { \
        if (threadIdx.x < 128) {                                                                       \
            asm volatile("setmaxnreg.dec.sync.aligned.u32 " #GIVEN ";");                               \
        } else {                                                                                       \
            asm volatile("setmaxnreg.inc.sync.aligned.u32 " #ASKED_HEX ";");                           \
        }                                                                                              \
        done[blockIdx.x * kThreads + threadIdx.x] = threadIdx.x < 128 ? GIVEN : ASKED;                 \
    }

FLASH8_REGISTERS(24, 240, 0xF0)
FLASH8_REGISTERS(40, 232, 0xE8)
FLASH8_REGISTERS(48, 232, 0xE8)
FLASH8_REGISTERS(56, 224, 0xE0)
FLASH8_REGISTERS(56, 232, 0xE8)
