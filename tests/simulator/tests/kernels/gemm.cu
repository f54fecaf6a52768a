// C = A * B^T with TMA, a ring of shared-memory stages and wgmma: a CuTe kernel for the simulator's
// tests. One producer warp fills the ring, one or two consumer warpgroups multiply. With clusters
// (GEMM_CLUSTER CTAs along N) the tile of A is loaded once and multicast.
//
//   GEMM_FP8      0: bfloat16 operands, 1: e4m3
//   GEMM_FP16     1: half operands
//   GEMM_CLUSTER  CTAs of a cluster that share a tile of A: 1 or 2
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

#ifndef GEMM_CLUSTER
#define GEMM_CLUSTER 1
#endif

#if GEMM_FP8
using Element = cutlass::float_e4m3_t;
using MmaAtom = SM90_64x128x32_F32E4M3E4M3_SS_TN<>;
#elif GEMM_FP16
using Element = cutlass::half_t;
using MmaAtom = SM90_64x128x16_F32F16F16_SS<GMMA::Major::K, GMMA::Major::K>;
#else
using Element = cutlass::bfloat16_t;
using MmaAtom = SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>;
#endif

constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 128 / sizeof(Element), kStages = 3;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (kConsumers + 1);

using SmemLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                          Shape<Int<kBlockM>, Int<kBlockK>, Int<kStages>>{}));
using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

struct alignas(128) TensorMapBytes {
    char bytes[128];
};

struct alignas(1024) SharedStorage {
    alignas(1024) Element a[cosize_v<SmemLayout>];
    alignas(1024) Element b[cosize_v<SmemLayout>];
    alignas(16) FullBarrier full[kStages];
    EmptyBarrier empty[kStages];
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gemm(const __grid_constant__ TensorMapBytes map_a, const __grid_constant__ TensorMapBytes map_b, float* c,
         int m, int n, int k) {
    extern __shared__ char memory[];
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(memory);
    const int warpgroup = cutlass::canonical_warp_group_idx();
    const int k_tiles = (k + kBlockK - 1) / kBlockK;
    const int m_block = blockIdx.y, n_block = blockIdx.x;
    constexpr uint32_t kBytes = 2 * kBlockM * kBlockK * sizeof(Element);

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            storage.full[s].init(1);
            storage.empty[s].init(kConsumers * GEMM_CLUSTER);
        }
        cutlass::arch::fence_barrier_init();
    }
    if constexpr (GEMM_CLUSTER > 1) {
        cute::cluster_arrive_relaxed();
        cute::cluster_wait();
    } else {
        __syncthreads();
    }

    Tensor sA = make_tensor(make_smem_ptr(storage.a), SmemLayout{});
    Tensor sB = make_tensor(make_smem_ptr(storage.b), SmemLayout{});

    if (warpgroup == 0) {
        cutlass::arch::warpgroup_reg_dealloc<40>();
        if (threadIdx.x / 32 == 0 && cute::elect_one_sync()) {
            const uint64_t hint = uint64_t(TMA::CacheHintSm90::EVICT_NORMAL);
            for (int i = 0; i < k_tiles; ++i) {
                const int s = i % kStages;
                storage.empty[s].wait((i / kStages & 1) ^ 1);
                storage.full[s].arrive_and_expect_tx(kBytes);
                uint64_t* barrier = reinterpret_cast<uint64_t*>(&storage.full[s]);
                if constexpr (GEMM_CLUSTER > 1) {
                    // Each CTA brings its share of A's rows to all of them.
                    constexpr int kRows = kBlockM / GEMM_CLUSTER;
                    const int rank = cute::block_rank_in_cluster();
                    SM90_TMA_LOAD_MULTICAST_2D::copy(
                        &map_a, barrier, (1 << GEMM_CLUSTER) - 1, hint,
                        raw_pointer_cast(sA(_, _, s).data()) + rank * kRows * kBlockK, i * kBlockK,
                        m_block * kBlockM + rank * kRows);
                } else {
                    SM90_TMA_LOAD_2D::copy(&map_a, barrier, hint, raw_pointer_cast(sA(_, _, s).data()),
                                           i * kBlockK, m_block * kBlockM);
                }
                SM90_TMA_LOAD_2D::copy(&map_b, barrier, hint, raw_pointer_cast(sB(_, _, s).data()),
                                       i * kBlockK, n_block * kBlockN);
            }
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<232>();
        const int consumer = warpgroup - 1;
        TiledMMA mma = make_tiled_mma(MmaAtom{});
        ThrMMA thread_mma = mma.get_slice(threadIdx.x % 128);
        Tensor sA_mine = local_tile(sA, Shape<_64, Int<kBlockK>>{}, make_coord(consumer, 0, _));
        Tensor tCrA = thread_mma.partition_fragment_A(sA_mine);
        Tensor tCrB = thread_mma.partition_fragment_B(sB);
        Tensor accumulator = partition_fragment_C(mma, Shape<_64, Int<kBlockN>>{});
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        for (int i = 0; i < k_tiles; ++i) {
            const int s = i % kStages;
            storage.full[s].wait(i / kStages & 1);
            warpgroup_fence_operand(accumulator);
            warpgroup_arrive();
            for (int kk = 0; kk < size<2>(tCrA); ++kk) {
                cute::gemm(mma, tCrA(_, _, kk, s), tCrB(_, _, kk, s), accumulator);
                mma.accumulate_ = GMMA::ScaleOut::One;
            }
            warpgroup_commit_batch();
            warpgroup_wait<0>();
            warpgroup_fence_operand(accumulator);
            // One thread a warpgroup and CTA frees the slot: wait_group was a meeting of the warpgroup.
            if (threadIdx.x % 128 < GEMM_CLUSTER) {
                storage.empty[s].arrive(threadIdx.x % 128, true);
            }
        }
        Tensor coordinates = thread_mma.partition_C(make_identity_tensor(Shape<_64, Int<kBlockN>>{}));
        for (int i = 0; i < size(accumulator); ++i) {
            const int row = m_block * kBlockM + consumer * 64 + get<0>(coordinates(i));
            const int column = n_block * kBlockN + get<1>(coordinates(i));
            if (row < m && column < n) {
                c[int64_t(row) * n + column] = accumulator(i);
            }
        }
    }
    // Nobody leaves while the other CTA may still arrive on its barriers.
    if constexpr (GEMM_CLUSTER > 1) {
        cute::cluster_arrive();
        cute::cluster_wait();
    }
}
