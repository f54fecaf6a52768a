// Additions into L2 from all multiprocessors: the bulk reduction from shared memory, and red.v4 from
// registers, both of tiles of 64 x 128 fp32 ones (32 KB, a dQ tile of the backward). In iteration n
// CTA c adds to tile (c * first + n % span) % tiles: first = span for CTAs that keep apart, first = 1
// and span = tiles for CTAs that walk over the same ones. target (tiles, 64, 128) then counts.

#include <cstdint>

namespace {

constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kTile = kRows * kColumns;
constexpr int kThreads = 256;
constexpr int kCopies = 4;    // bulk copies of a tile
constexpr int kInFlight = 1;  // tiles that may still be on their way

__device__ float* tile_of(float* target, int n, int first, int span, int tiles) {
    return target + static_cast<int64_t>((blockIdx.x * first + n % span) % tiles) * kTile;
}

__device__ void add(float* target) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(target), "f"(1.0f) : "memory");
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    bulk_reduce(float* target, long long* cycles, int iterations, int first, int span, int tiles) {
    __shared__ alignas(128) float staged[kTile];
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
        staged[i] = 1.0f;
    }
    // The bulk engine reads what the generic proxy has written.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        long long const start = clock64();
        for (int n = 0; n < iterations; ++n) {
            float* const tile = tile_of(target, n, first, span, tiles);
            for (int i = 0; i < kCopies; ++i) {
                uint32_t const source =
                    static_cast<uint32_t>(__cvta_generic_to_shared(staged + i * (kTile / kCopies)));
                asm volatile(
                    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                        tile + i * (kTile / kCopies)),
                    "r"(source), "r"(static_cast<int>(sizeof(float)) * kTile / kCopies)
                    : "memory");
            }
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kInFlight) : "memory");
        }
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        cycles[blockIdx.x] = clock64() - start;
    }
}

// A warp adds 512 bytes in a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    red_rows(float* target, long long* cycles, int iterations, int first, int span, int tiles) {
    __syncthreads();
    long long const start = clock64();
    for (int n = 0; n < iterations; ++n) {
        float* const tile = tile_of(target, n, first, span, tiles) + threadIdx.x * 4;
#pragma unroll
        for (int i = 0; i < kTile / kThreads / 4; ++i) {
            add(tile + i * kThreads * 4);
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        cycles[blockIdx.x] = clock64() - start;
    }
}

// A warp adds 64 bytes in each of 8 rows, as the registers of an accumulator lie after one exchange.
extern "C" __global__ void __launch_bounds__(kThreads)
    red_fragments(float* target, long long* cycles, int iterations, int first, int span, int tiles) {
    int const warp = threadIdx.x / 32;
    int const lane = threadIdx.x % 32;
    int const row = warp * 8 + lane / 4;
    __syncthreads();
    long long const start = clock64();
    for (int n = 0; n < iterations; ++n) {
        float* const tile = tile_of(target, n, first, span, tiles) + row * kColumns + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i) {
            add(tile + i * 16);
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        cycles[blockIdx.x] = clock64() - start;
    }
}
