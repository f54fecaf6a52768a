// The forward kernel: one producer warpgroup feeds two or three consumer warpgroups. One variant per
// compilation; flash8.variants says which -D options there are.

#include "consumer.cuh"
#include "producer.cuh"

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
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = kSharedBytes;
    info.producer_registers = Config::kProducerRegisters;
    info.consumer_registers = Config::kConsumerRegisters;
    constexpr bool kHalf = Config::kElement == ElementChoice::kFp16;
    auto const box = [](int panel, int rows) {
        return TmaBox{4,
                      {static_cast<uint32_t>(panel), static_cast<uint32_t>(rows), 1, 1, 1},
                      kHalf ? ElementType::kFloat16 : ElementType::kBfloat16,
                      panel == 64 ? Swizzle::k128B : Swizzle::k64B};
    };
    info.pack_gqa = Config::kPackGqa;
    info.tma[0] = box(Config::kPanel, Config::kBlockM);
    if (Config::kPackGqa) {
        // One query head as it stands here; the host folds the heads of a KV head into the rows.
        info.tma[0].rank = 5;
        info.tma[0].box[1] = 1;
        info.tma[0].box[2] = Config::kBlockM;
    }
    info.tma[1] = box(Config::kPanel, Config::kBlockN);
    info.tma[2] = box(Config::kPanelV, Config::kBlockN);
    return info;
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::describe();

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads, 1)
    flash8_forward(flash8::ForwardParams const __grid_constant__ params) {
    using namespace flash8;
    extern __shared__ __align__(1024) char dynamic_shared[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&params.tma_q);
        ptx::prefetch_tensor_map(&params.tma_k);
        ptx::prefetch_tensor_map(&params.tma_v);
        constexpr int kConsumerWarps = Config::kConsumerWarpgroups * 4;
        shared.tiles.init(kConsumerWarps);
        shared.pipeline_q.init(kConsumerWarps);
        shared.pipeline_k.init(kConsumerWarps);
        shared.pipeline_v.init(kConsumerWarps);
        ptx::fence_barrier_init();
    }
    __syncthreads();

    if (warpgroup == 0) {
        ptx::release_registers<Config::kProducerRegisters>();
        if (threadIdx.x < 32) {
            Producer<Config>(params, shared).run();
        }
    } else {
        ptx::acquire_registers<Config::kConsumerRegisters>();
        Consumer<Config>(params, shared, warpgroup - 1).run();
    }
}
