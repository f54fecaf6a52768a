// The GEMM kernel for few rows of A: B is wgmma's first operand, whose rows come by 64, and A its second,
// whose rows come by 8. One variant per compilation; flash8.backends.hopper.gemm_variants says which -D
// options there are.

#include "small_m_epilogue.cuh"
#include "small_m_mainloop.cuh"
#include "small_m_producer.cuh"
#include "small_m_quantizer.cuh"
#include "small_m_split_k.cuh"

namespace flash8::small_m {

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(GemmParams);
    info.kind = KernelKind::kGemm;
    constexpr char kEntry[] = "flash8_gemm_small_m";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = Config::kBlockM;
    info.kBlockN = Config::kBlockN;
    info.kStages = Config::kStages;
    info.threads = Config::kThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = kSharedBytes;
    info.scale_block = Config::kBlockScales ? kScaleBlock : 0;
    info.max_splits = Config::kMaxSplits;
    auto const box = [](unsigned rows) {
        return TmaBox{4, {Config::kBlockK, rows, 1, 1, 1}, ElementType::kUint8, Swizzle::k128B};
    };
    info.tma[0] = box(Config::kBlockM);
    if (Config::kQuantizes) {
        bool const half = Config::kInput == quantize::Input::kFp16;
        info.tma[0].element_type = half ? ElementType::kFloat16 : ElementType::kBfloat16;
        info.tma[0].swizzle = Swizzle::kNone;
    }
    info.tma[1] = box(Config::kBlockN);
    return info;
}

__device__ void consume(GemmParams const& params, SharedStorage& shared, int warpgroup) {
    Mainloop mainloop(shared, warpgroup);
    TileWalk tiles(params);
    KBlocks const blocks = k_blocks(params);
    Tile tile;
    while (tiles.next(tile)) {
        Config::Accumulator sum;
        mainloop.run(blocks.end - blocks.begin, sum);
        Rows rows{tile.m0, params.m};
        if constexpr (Config::kMaxSplits > 1) {
            if (params.splits > 1) {
                int const warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32 % 4), 0);
                rows = SplitK::add_up(params, shared.received, tile.m0, warp, sum);
            }
        }
        if (rows.begin < rows.end) {
            Epilogue::store(params, tile.m0, tile.n0 + warpgroup * Config::kWaveRows, rows, sum);
        }
    }
}

}  // namespace flash8::small_m

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::small_m::describe();

extern "C" __global__ void __launch_bounds__(flash8::small_m::Config::kThreads, 1)
    flash8_gemm_small_m(flash8::GemmParams const __grid_constant__ params) {
    using namespace flash8;
    using namespace flash8::small_m;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<SharedStorage*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    bool const is_split = splits_of(params) > 1;
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&params.tma_a);
        ptx::prefetch_tensor_map(&params.tma_b);
        shared.init_pipeline();
        if (is_split) {
            SplitK::init(params, shared.received);
        }
        ptx::fence_barrier_init();
    }
    __syncthreads();
    if (is_split) {
        ptx::cluster_arrive_relaxed();  // others may send from here on, and wait for that when they do
    }

    if (warpgroup > Config::kConsumerWarpgroups) {
        if constexpr (Config::kQuantizes) {
            Quantizer::run(params, shared, static_cast<int>(threadIdx.x / 32 % 4));
        }
    } else if (warpgroup > 0) {
        consume(params, shared, warpgroup - 1);
    } else if (threadIdx.x == 0) {
        load_operands(params, shared);
    } else if (Config::kBlockScales && threadIdx.x / 32 == 1) {
        load_scales(params, shared);
    }
    bool const consumes = warpgroup > 0 && warpgroup <= Config::kConsumerWarpgroups;
    if (is_split && !consumes) {
        ptx::cluster_wait();  // every thread that arrives waits, too
    }
}
