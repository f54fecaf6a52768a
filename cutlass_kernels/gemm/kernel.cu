// The GEMM kernel: one producer warpgroup feeds two consumer warpgroups. One variant per compilation;
// flash8.backends.hopper.gemm_variants says which -D options there are.

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "producer.cuh"

namespace flash8::gemm {

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(GemmParams);
    info.kind = Config::kGroupedK ? KernelKind::kGemmGroupedK : KernelKind::kGemm;
    constexpr char kEntry[] = "flash8_gemm";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = Config::kBlockM;
    info.kBlockN = Config::kBlockN;
    info.kStages = Config::kStages;
    info.threads = Config::kThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = Config::kClusterM;
    info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = kSharedBytes;
    info.producer_registers = Config::Registers::kProducer;
    info.consumer_registers = Config::Registers::kConsumer;
    info.scale_block = Config::kBlockScales ? kScaleBlock : 0;
    auto const box = [](unsigned rank, unsigned rows) {
        return TmaBox{rank, {Config::kBlockK, rows, 1, 1, 1}, ElementType::kUint8, Swizzle::k128B};
    };
    info.tma[0] = box(4, Config::kBlockM);
    info.tma[1] = box(Config::kGrouped ? kGroupedRank : 4, Config::kBlockN / Config::kClusterM);
    return info;
}

__device__ void consume(GemmParams const& params, SharedStorage& shared, int warpgroup) {
    Mainloop mainloop(shared, warpgroup);
    TileWalk tiles(params);
    int const all_blocks = k_blocks(params);
    Tile tile;
    while (tiles.next(tile)) {
        Config::Accumulator sum[Config::kWaves];
        mainloop.run(k_blocks_of(tile, all_blocks), tile.n0, sum);
#pragma unroll
        for (int wave = 0; wave < Config::kWaves; ++wave) {
            int const row = tile.m0 + mainloop.first_row() + wave * Config::kWaveRows;
            Epilogue::store(params, tile, row, sum[wave]);
        }
    }
}

}  // namespace flash8::gemm

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::gemm::describe();

extern "C" __global__ void __launch_bounds__(flash8::gemm::Config::kThreads, 1)
    flash8_gemm(flash8::GemmParams const __grid_constant__ params) {
    using namespace flash8;
    using namespace flash8::gemm;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<SharedStorage*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&params.tma_a);
        ptx::prefetch_tensor_map(&params.tma_b);
        shared.init_pipeline();
        ptx::fence_barrier_init();
    }
    if constexpr (Config::kClusterM > 1) {
        ptx::cluster_sync();  // the other CTA's loads signal the barriers of this one
    } else {
        __syncthreads();
    }

    if (warpgroup == 0) {
        ptx::release_registers<Config::Registers::kProducer>();
        if (threadIdx.x < Config::kWalkingLanes) {
            load_operands(params, shared, TileWalk(params));
        }
        if constexpr (Config::kBlockScales) {
            if (threadIdx.x / 32 == 1) {
                load_scales(params, shared, TileWalk(params));
            }
        }
        if constexpr (Config::kGrouped) {
            if (threadIdx.x / 32 == 2) {
                clear_rows_of_no_group(params);
            }
        }
        if constexpr (Config::kGroupedK) {
            if (threadIdx.x / 32 == 2) {
                cut_stages(params, shared);
            } else if (threadIdx.x / 32 == 3) {
                clear_groups_without_k(params);
            }
        }
    } else {
        ptx::acquire_registers<Config::Registers::kConsumer>();
        consume(params, shared, warpgroup - 1);
    }
}
