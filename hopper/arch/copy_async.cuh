// Copies of a few bytes a lane that do not wait, from anywhere in global to anywhere in shared memory. They
// write in the generic proxy: the tensor core sees them behind a proxy fence.

#pragma once

#include "ptx.cuh"

namespace flash8::ptx {

// 16 bytes from global to shared memory; without `reads` zeros, and nothing is read.
__device__ __forceinline__ void copy_async_16(uint32_t target, void const* source, bool reads) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(reads ? 16 : 0)
                 : "memory");
}

// The same of 4 bytes, which are always read.
__device__ __forceinline__ void copy_async_4(uint32_t target, void const* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this thread but the newest kPending.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at `barrier` once all earlier copies of this thread have landed. The barrier expects one arrival
// of every thread that does so.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

}  // namespace flash8::ptx
