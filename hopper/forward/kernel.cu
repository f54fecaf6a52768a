// The forward kernel: one producer warpgroup feeds two or three consumer warpgroups. One variant per
// compilation; flash8.backends.hopper.variants says which -D options there are.

#include "consumer.cuh"
#include "page_gatherer.cuh"
#include "producer.cuh"
#include "transpose_v.cuh"
#include "widener.cuh"

namespace flash8 {

using Config = ForwardConfig;

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(ForwardParams);
    info.kind = KernelKind::kForward;
    constexpr char kEntry[] = "flash8_forward";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = Config::kBlockM;
    info.kBlockN = Config::kBlockN;
    info.kHeadDim = Config::kHeadDim;
    info.kHeadDimV = Config::kHeadDimV;
    info.kStages = Config::kStages;
    info.threads = Config::kThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = Config::kClusterM;
    info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = kSharedBytes;
    info.producer_registers = Config::Registers::kProducer;
    info.consumer_registers = Config::Registers::kConsumer;
    info.scale_block = Config::kBlockScales ? kScaleBlock : 0;
    constexpr auto kType = Config::kFp8                               ? ElementType::kUint8
                           : Config::kElement == ElementChoice::kFp16 ? ElementType::kFloat16
                                                                      : ElementType::kBfloat16;
    auto const box = [](unsigned panel, unsigned rows, Swizzle swizzle) {
        return TmaBox{4, {panel, rows, 1, 1, 1}, kType, swizzle};
    };
    info.pack_gqa = Config::kPackGqa;
    info.tma[0] = box(Config::kPanel, Config::kBlockM, Config::TileQ::kSwizzle);
    if (Config::kPackGqa) {
        // The box of one query head; the host folds the heads of a KV head into the rows.
        info.tma[0].rank = 5;
        info.tma[0].box[1] = 1;
        info.tma[0].box[2] = Config::kBlockM;
    }
    info.tma[1] = box(Config::kPanel, Config::kBlockN / Config::kClusterM, Config::TileK::kSwizzle);
    info.tma[2] = box(Config::kPanelV, Config::kBlockN / Config::kClusterM, Config::TileV::kSwizzle);
    info.v_colmajor = Config::kVColMajor;
    info.paged = Config::kPages;
    info.out_e4m3 = Config::kOutE4m3;
    if (Config::kGather || Config::kWidens) {
        info.tma[1] = info.tma[2] = TmaBox{};
    }
    if (Config::kVColMajor) {
        info.tma[2] = box(Config::kPanelVt, Config::kHeadDimV / Config::kClusterM, Config::TileVt::kSwizzle);
    }
    return info;
}

// What the other warps of the producer warpgroup do, by their number.
template <class Config>
__device__ __forceinline__ void help_producer(ForwardParams const& params, SharedStorage<Config>& shared,
                                              int warp) {
    constexpr int kFirstTransposer = 1 + Config::kGatherWarps;
    if constexpr (Config::kGather) {
        if (warp > 0 && warp < kFirstTransposer) {
            gather_pages(params, shared, warp - 1);
        }
    }
    if constexpr (Config::kTransposeV) {
        if (warp >= kFirstTransposer) {
            Transposer<Config>(params, shared, warp - kFirstTransposer).run();
        }
    }
}

// By the producer warpgroup. A template, so that roles which a variant lacks are not compiled.
template <class Config>
__device__ __forceinline__ void produce(ForwardParams const& params, SharedStorage<Config>& shared) {
    if constexpr (Config::kWidens) {
        int const warp = threadIdx.x / 32;
        Widener<Config>(params, shared, __shfl_sync(0xffffffff, warp, 0)).run();
    } else if constexpr (Config::kPaged) {
        if (threadIdx.x < 32) {
            Producer<Config>(params, shared).run();
        }
        // The warp that loads pages has no register in which to keep its number.
        help_producer<Config>(params, shared, threadIdx.x / 32);
    } else {
        int const warp = threadIdx.x / 32;
        if (warp == 0) {
            Producer<Config>(params, shared).run();
        }
        help_producer<Config>(params, shared, warp);
    }
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::describe();

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads, 1)
    flash8_forward(flash8::ForwardParams const __grid_constant__ params) {
    using namespace flash8;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&params.tma_q);
        if constexpr (!Config::kGather && !Config::kWidens) {
            ptx::prefetch_tensor_map(&params.tma_k);
            ptx::prefetch_tensor_map(&params.tma_v);
        }
        shared.init_pipelines();
        ptx::fence_barrier_init();
    }
    if constexpr (Config::kClusterM > 1) {
        ptx::cluster_sync();  // the other CTA's loads signal the barriers of this one
    } else {
        __syncthreads();
    }

    if (warpgroup == 0) {
        ptx::release_registers<Config::Registers::kProducer>();
        produce(params, shared);
    } else {
        ptx::acquire_registers<Config::Registers::kConsumer>();
        Consumer<Config>(params, shared, warpgroup - 1).run();
    }
    if constexpr (Config::kClusterM > 1) {
        ptx::cluster_sync();  // the other CTA's consumers arrive at the barriers of this one
    }
}
